"""Where a job stands: an ordered tuple of small questions, the first match wins. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api.report import Phase, Termination
from finetune_api.status import StatusArtifacts, StatusAttempt, StatusMetrics
from finetune_operator.conditions import Say
from finetune_operator.ends import published_at
from finetune_operator.failures import Budget, PodCause, Spent, policy, spent
from finetune_operator.observe import parse_time
from finetune_operator.progress_view import PHASE_WORDS
from finetune_operator.sentences import as_sentence, count, cut, decimal, enumeration
from finetune_operator.situation import Situation, condition, run_policy
from finetune_operator.verdict import Command, StopJob
from finetune_operator.waiting import PREPARING, Waiting, waiting

PENDING_LOOK_SECONDS = 3.0
WAITING_LOOK_SECONDS = 10.0
STOPPING_LOOK_SECONDS = 5.0
SUSPENDING_LOOK_SECONDS = 0.5  # a pod that has ended is removed about a second later, and its last words with it
RESTARTING_LOOK_SECONDS = 5.0
FIRST_PROGRESS_SECONDS = 2.0
OTHERS_FOLLOW_SECONDS = 60.0  # launchers that have agreed on success end within seconds of each other


@dataclass(frozen=True)
class Judgement:
    """What one check found."""

    state: str
    message: str
    conditions: Mapping[str, Say]
    commands: tuple[Command, ...] = ()
    look_again_seconds: float | None = None
    artifacts: StatusArtifacts | None = None
    metrics: StatusMetrics | None = None
    ended: bool = False  # for good
    at_once: bool = False  # its message does not wait for the next page of progress


Check = Callable[[Situation], Judgement | None]


def judge(at: Situation) -> Judgement:
    """The first check that has an answer."""
    for check in CHECKS:
        if found := check(at):
            return found
    raise AssertionError("the last check always answers")


# ---- the end ------------------------------------------------------------------------------------------------------


def completed(at: Situation) -> Judgement | None:
    """Every launcher exited with 0, which they do only after the artifact was read back and verified.

    So one pod that said so and ended is enough, should another one be lost before its exit was seen: it would be made
    again, and wait for launchers that never return (see ``published``). If nobody kept the last word of rank 0 the
    digest is unknown, and ``ArtifactsPublished`` says so; the job is complete all the same, and its artifact names its
    own digest.
    """
    if at.job is None or not (at.job.complete or _others_are_late(at)):
        return None
    said = _last_word(at)
    artifacts = _artifacts(said) or at.before.artifacts
    if artifacts is not None:
        published = Say(
            True, "Verified", f"{count(artifacts.files, 'file')} at {artifacts.uri}, read back and verified"
        )
        message = f"completed: {count(artifacts.files, 'file')} at {artifacts.uri}"
    else:
        where = at.artifact_prefix
        published = Say(None, "LastWordLost", f"the pod of rank 0 is gone; {where}latest.json names what it published")
        message = f"completed, but the pod that published is gone: {where}latest.json names the artifact"
    return Judgement(
        "Complete",
        message,
        {
            "PodsReady": Say(False, "Complete", f"{'all pods have' if at.job.complete else 'one pod has'} succeeded"),
            "Running": Say(False, "Complete", "training finished"),
            "Suspended": Say(False, "Complete"),
            "ArtifactsPublished": published,
            "Complete": Say(True, "Complete", message),
            "Reconciling": Say(False, "Complete", message),
            "Stalled": Say(False, "Complete"),
        },
        artifacts=artifacts,
        metrics=_metrics(said) or at.before.metrics,
        ended=True,
    )


def _others_are_late(at: Situation) -> bool:
    """Whether the pod that published ended so long ago that the others will not follow."""
    when = published_at(at.before, at.newest)
    return when is not None and (at.now - when).total_seconds() > OTHERS_FOLLOW_SECONDS


def published(at: Situation) -> Judgement | None:
    """The artifact is verified, and the other pods are about to end: nothing that they meet now is a failure.

    Its digest is kept at once: the pod that told it may be removed before the others have ended.
    """
    if published_at(at.before, at.newest) is None:
        return None
    said = _last_word(at)
    told = _unchanged(at, STOPPING_LOOK_SECONDS)
    return replace(told, artifacts=_artifacts(said), metrics=_metrics(said))


def _last_word(at: Situation) -> Termination | None:
    """What the pod that published said: index 0 first."""
    succeeded = sorted((pod for pod in at.observed.pods or () if pod.phase == "Succeeded"), key=lambda pod: pod.index)
    words = [pod.termination for pod in succeeded if pod.termination is not None]
    return next((said for said in words if said.artifact_manifest_sha256), None)


def _artifacts(said: Termination | None) -> StatusArtifacts | None:
    if said is None or not said.artifact_uri or not said.artifact_manifest_sha256:
        return None
    return StatusArtifacts(
        uri=cut(said.artifact_uri, 2048),
        manifest_sha256=said.artifact_manifest_sha256,
        files=said.artifact_files or 0,
        bytes=said.artifact_bytes or 0,
    )


def _metrics(said: Termination | None) -> StatusMetrics | None:
    if said is None or not said.metrics:
        return None
    names = {
        "train_loss": "trainLoss",
        "validation_loss": "validationLoss",
        "base_validation_loss": "baseValidationLoss",
    }
    return StatusMetrics(**{ours: decimal(said.metrics.get(theirs), 6) for ours, theirs in names.items()})


def failed_by_its_input(at: Situation) -> Judgement | None:
    """The last attempt ended by something that only the owner can mend: never started again."""
    last = at.last_ended()
    if last is None or last.cause is None or policy(last.cause).budget != Budget.NEVER:
        return None
    if last.cause == PodCause.DEADLINE_EXCEEDED:
        return None
    return _failed(at, last.cause, last.message or policy(last.cause).words)


def failed_for_good(at: Situation) -> Judgement | None:
    """A budget of restarts is used up."""
    if at.last_ended() is None or at.job is None or at.job.complete:
        return None
    over = spent(at.ledger.restarts, at.max_restarts)
    return _failed(at, over.reason, _spent_words(over, at.last_ended())) if over else None


def _spent_words(over: Spent, last: StatusAttempt | None) -> str:
    why = as_sentence(last.message) if last and last.message else "no reason is known"
    kind = "failures" if over.reason == "RestartBudgetExceeded" else "disruptions"
    return f"gave up after {over.used} {kind} ({over.words} allows {over.allowed}); the last one: {why}"


def failed_by_the_job(at: Situation) -> Judgement | None:
    """Kubernetes ended the Job: deadline, back-off limit, pod failure policy."""
    if at.job is None or at.job.failure is None:
        return None
    reason, message = at.job.failure
    if reason != "DeadlineExceeded":
        last = at.last_ended()
        why = as_sentence(last.message) if last and last.message else as_sentence(message)
        return _failed(at, reason or "JobFailed", f"the Job {at.job.name} failed ({reason}): {why}")
    seconds = run_policy(at.observed.resource).get("activeDeadlineSeconds", at.job.active_deadline_seconds)
    over = f"the job ran longer than runPolicy.activeDeadlineSeconds ({seconds} s)"
    if at.job.terminating or at.living:
        return Judgement(
            at.before.state or "Running",
            f"{over}; its pods write a checkpoint and end",
            {"Running": Say(False, reason, over), "Reconciling": Say(True, reason, over)},
            look_again_seconds=STOPPING_LOOK_SECONDS,
            at_once=True,
        )
    checkpoint = at.checkpoint()
    kept = f"the checkpoint of step {checkpoint.step} is kept" if checkpoint else "no checkpoint was written"
    return _failed(at, reason, f"{over}; {kept}")


def _failed(at: Situation, reason: str, sentence: str) -> Judgement:
    message = cut(sentence)
    stop = at.job is not None and at.job.failure is None and not at.job.suspended
    return Judgement(
        "Failed",
        message,
        {
            "PodsReady": Say(False, reason, "the job has failed"),
            "Running": Say(False, reason, "the job has failed"),
            "Suspended": Say(False, reason),
            "Failed": Say(True, reason, message),
            "Reconciling": Say(False, reason, message),
            "Stalled": Say(True, reason, message),
        },
        commands=(StopJob(),) if stop else (),
        ended=True,
    )


# ---- asked to stop ------------------------------------------------------------------------------------------------


def suspended(at: Situation) -> Judgement | None:
    """Pods write a checkpoint and end; suspended when none is left."""
    if not at.stopping:
        return None
    job = at.job
    living = [pod.name for pod in at.living]
    remaining = len(living) or (job.active + job.terminating if job is not None else 0)
    if remaining:
        who = enumeration(living) if living else count(remaining, "pod")
        message = f"suspending: {who} {'writes' if remaining == 1 else 'write'} a checkpoint and end"
        message = message[:-3] + "ends" if remaining == 1 else message
        return Judgement(
            "Suspending",
            message,
            {
                "PodsReady": Say(False, "Suspending", message),
                "Running": Say(False, "Suspending", message),
                "Suspended": Say(False, "Suspending", message),
                "Reconciling": Say(True, "Suspending", message),
            },
            look_again_seconds=SUSPENDING_LOOK_SECONDS,
        )
    checkpoint = at.checkpoint()
    more = f"; it will resume from step {checkpoint.step} or later" if checkpoint else ""
    message = f"suspended: no pod is left{more}"
    return Judgement(
        "Suspended",
        message,
        {
            "PodsReady": Say(False, "Suspended", "the job is suspended"),
            "Running": Say(False, "Suspended", "the job is suspended"),
            "Suspended": Say(True, "Suspended", message),
            "Reconciling": Say(False, "Suspended", message),
        },
    )


# ---- alive --------------------------------------------------------------------------------------------------------


def restarting(at: Situation) -> Judgement | None:
    """The last attempt is over and the next one has not begun."""
    last = at.last_ended()
    if last is None or last.cause == PodCause.SUSPENDED:
        return None
    why = as_sentence(last.message) if last.message else policy(last.cause or "").words
    checkpoint = at.checkpoint()
    place = f"step {checkpoint.step} or later" if checkpoint else "the beginning"
    if at.job is not None and at.job.ready >= at.nodes and at.view is not None:
        now = Say(False, "Restarting", PHASE_WORDS[at.view.phase])
    elif at.observed.pods is None and at.before.state == "Restarting":
        return _unchanged(at)
    else:
        found = waiting(at.observed, at.newest)
        now = Say(False, found.reason, found.message)
    message = f"restarting from {place} after attempt {last.number} ended: {why}; now: {now.message}"
    return Judgement(
        "Restarting",
        cut(message),
        {
            "PodsReady": now,
            "Running": Say(False, "Restarting", f"attempt {last.number} ended: {why}"),
            "Suspended": Say(False, "Restarting"),
            "Reconciling": Say(True, "Restarting", f"attempt {last.number} ended: {why}"),
        },
        look_again_seconds=_meeting_seconds(at, parse_time(last.ended_at)) or RESTARTING_LOOK_SECONDS,
    )


def _unchanged(at: Situation, look_again_seconds: float = RESTARTING_LOOK_SECONDS) -> Judgement:
    """Nothing new is said."""
    before = at.before
    return Judgement(before.state or "", before.message or "", {}, look_again_seconds=look_again_seconds)


def publishing(at: Situation) -> Judgement | None:
    """Training is over; the artifact is on its way."""
    if at.view is None or at.view.phase not in {Phase.PUBLISHING, Phase.DONE} or not at.ledger.is_open:
        return None
    return _alive(at, "Publishing", at.view.message)


def running(at: Situation) -> Judgement | None:
    """An attempt has begun and is not over."""
    if not at.ledger.is_open:
        return None
    if at.view is not None:
        return _alive(at, "Running", at.view.message)
    if at.before.state in {"Running", "Publishing"}:
        return _alive(at, at.before.state, at.before.message or "")
    return _alive(at, "Running", f"{count(at.nodes, 'pod')} {'runs' if at.nodes == 1 else 'run'}; {PREPARING}")


def _alive(at: Situation, state: str, message: str) -> Judgement:
    new = at.before.state not in {"Running", "Publishing"}
    leaving = [pod.name for pod in at.newest if pod.deleted is not None and not pod.ended]
    if leaving:
        message = f"{message}; {enumeration(leaving)} {'is' if len(leaving) == 1 else 'are'} being deleted"
    run = f"attempt {at.ledger.total} of the ranks runs on {count(at.nodes, 'pod')}"
    return Judgement(
        state,
        cut(message),
        {
            **_readiness(at),
            "Running": Say(True, state, run),
            "Suspended": Say(False, "Running"),
            "Reconciling": Say(True, state, run),
        },
        look_again_seconds=FIRST_PROGRESS_SECONDS if new else float(at.settings.progress.interval_seconds),
    )


def _readiness(at: Situation) -> dict[str, Say]:
    """A launcher may hang or a pod may end while the attempt goes on; without a look at the pods nothing is said."""
    job = at.job
    if job is None or job.ready + job.succeeded >= at.nodes:
        ready = f"{count(at.nodes, 'pod')} {'is' if at.nodes == 1 else 'are'} ready"
        return {"PodsReady": Say(True, "Ready", ready)}
    names = [pod.name for pod in at.newest if not pod.ready and pod.phase != "Succeeded"]
    if not names:
        return {}
    return {
        "PodsReady": Say(False, "PodsNotReady", f"{enumeration(names)} {'is' if len(names) == 1 else 'are'} not ready")
    }


def pending(at: Situation) -> Judgement | None:
    """No attempt has begun: what is waited for?"""
    known = condition(at.before, "PodsReady")
    was_refused = known is not None and known.reason == "ChildRefused"  # it has its Job now
    if (
        at.observed.pods is None
        and at.before.state in {"Pending", "Starting"}
        and at.before.message
        and not was_refused
    ):
        return Judgement(at.before.state, at.before.message, {}, look_again_seconds=_pending_seconds(at))
    found = waiting(at.observed, at.newest)
    if at.all_ready and at.view is not None:
        found = Waiting(found.reason, PHASE_WORDS[at.view.phase])
    started = any(pod.started is not None and not pod.ended for pod in at.newest)
    state = "Starting" if started else "Pending"
    return Judgement(
        state,
        found.message,
        {
            **(_readiness(at) if at.all_ready else {"PodsReady": Say(False, found.reason, found.message)}),
            "Running": Say(False, state, found.message),
            "Suspended": Say(False, state),
            "Reconciling": Say(True, state, found.message),
        },
        look_again_seconds=_pending_seconds(at),
    )


def _pending_seconds(at: Situation) -> float:
    began = (at.job.resumed or at.job.created) if at.job else None
    if soon := _meeting_seconds(at, began):
        return soon
    waited = (at.now - began).total_seconds() if began else 0.0
    return max(0.5, PENDING_LOOK_SECONDS - waited) if waited < PENDING_LOOK_SECONDS else WAITING_LOOK_SECONDS


def _meeting_seconds(at: Situation, since: datetime | None) -> float | None:
    """Until the next look at pods that are all ready: no event tells that their launchers have met.

    That takes seconds, or minutes where they fetch a model.
    """
    if not at.all_ready:
        return None
    waited = (at.now - since).total_seconds() if since else 0.0
    return min(max(FIRST_PROGRESS_SECONDS, waited / 5), WAITING_LOOK_SECONDS)


CHECKS: tuple[Check, ...] = (
    completed,
    published,
    failed_by_its_input,
    failed_for_good,
    failed_by_the_job,
    suspended,
    restarting,
    publishing,
    running,
    pending,
)
