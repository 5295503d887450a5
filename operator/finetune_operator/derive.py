"""The judgement: Observed -> Verdict. Pure and level-triggered; ``observed.now`` is the only clock.

situation (what is known) -> checks (where the job stands) -> conditions -> story (what changed) -> commands
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_api.errors import Problem
from finetune_api.plan import Plan
from finetune_api.status import FineTuneJobStatus, StatusPlan, StatusProgress
from finetune_operator.checks import Judgement, judge
from finetune_operator.conditions import Say, merge
from finetune_operator.ledger import restart_rows
from finetune_operator.observe import JobView, Object, Observed, parse_time
from finetune_operator.progress_view import status_plan
from finetune_operator.remedies import remedies
from finetune_operator.sentences import cut, time_text
from finetune_operator.settings import OperatorSettings
from finetune_operator.situation import Situation, condition, is_due, is_true, run_policy, situation, status_before
from finetune_operator.story import PATIENCE_SECONDS, Change, story
from finetune_operator.verdict import DeleteResource, Event, EventType, Verdict

_PROGRESS_INTERVAL_SECONDS = 10


def derive(
    observed: Observed, plan: Plan | None, settings: OperatorSettings, problems: Sequence[Problem] = ()
) -> Verdict:
    """What to say about the job and what to do. The same Observed gives the same Verdict.

    ``problems``: why there is no plan. What an earlier version has started runs on under a later one that refuses it.

    Whoever carries it out writes the status first, so that a lost pod stands in the ledger before it is deleted, and
    makes sure of StopJob again whenever it meets a job that has ended.
    """
    before = status_before(observed.resource)
    if _is_over(before):
        return derive_ended(observed)
    at = situation(observed, plan, settings)
    judgement = judge(at)
    after = _status(at, judgement, problems)
    events = story(Change(before, after, observed))
    if problems and condition(before, "Accepted") != condition(after, "Accepted"):
        events = (Event("Invalid", _first(problems), EventType.WARNING), *events)
    commands = judgement.commands + (() if judgement.ended else remedies(at))
    if judgement.ended:
        life = seconds_to_live({**observed.resource, "status": dump(after)}, observed.now)
        return Verdict(after, events, commands, None if life is None else max(0.0, life))
    return Verdict(after, events, commands, judgement.look_again_seconds)


def derive_invalid(observed: Observed, problems: Sequence[Problem]) -> Verdict:
    """Every problem, and nothing more until the spec changes."""
    before = status_before(observed.resource)
    message = _first(problems)
    said = {
        "Accepted": _refused(problems),
        "PodsReady": Say(False, "InvalidSpec"),
        "Running": Say(False, "InvalidSpec"),
        "Reconciling": Say(False, "InvalidSpec"),
        "Stalled": Say(True, "InvalidSpec", message),
    }
    after = before.model_copy(
        update={
            "observed_generation": observed.generation,
            "state": "Invalid",
            "message": message,
            "conditions": merge(before.conditions, said, observed.generation, time_text(observed.now)),
        }
    )
    known = condition(before, "Accepted")
    new = known is None or known.status != "False" or known.message != (condition(after, "Accepted") or known).message
    return Verdict(after, (Event("Invalid", message, EventType.WARNING),) if new else ())


def _first(problems: Sequence[Problem]) -> str:
    more = f" (and {len(problems) - 1} more: see condition Accepted)" if len(problems) > 1 else ""
    return cut(str(problems[0]), 900) + more


def _refused(problems: Sequence[Problem]) -> Say:
    return Say(False, "InvalidSpec", "\n".join(cut(str(problem)) for problem in problems))


def derive_refused(observed: Observed, sentence: str) -> Verdict:
    """The API server does not take a child, in its own words; tried again and again."""
    before = status_before(observed.resource)
    message = cut(sentence)
    state = "Restarting" if before.attempts else "Pending"
    if before.state == "Suspended" and run_policy(observed.resource).get("suspend"):
        state = "Suspended"
    said = {
        "Accepted": Say(True, "Accepted", "the spec is valid"),
        "PodsReady": Say(False, "ChildRefused", message),
        "Running": Say(False, state, message),
        "Suspended": Say(state == "Suspended", state),
        "Reconciling": Say(True, "ChildRefused", message),
        "Stalled": Say(False, "Accepted"),
    }
    now = time_text(observed.now)
    update = {"observed_generation": observed.generation, "state": state, "message": message}
    conditions = merge(before.conditions, said, observed.generation, now)
    known = condition(before, "PodsReady")
    new = known is None or known.reason != "ChildRefused"
    after = before.model_copy(update={**update, "conditions": conditions})
    return Verdict(after, (Event("Waiting", message, EventType.WARNING),) if new else ())


def has_ended(resource: Object) -> bool:
    """Whether the job is complete or has failed: nothing is made for it any more."""
    return _is_over(status_before(resource))


def is_settled(resource: Object, job: JobView | None = None) -> bool:
    """Whether nothing is left to do but to wait for the end of its time to live."""
    status = status_before(resource)
    generation = resource["metadata"].get("generation", 1)
    over = _is_over(status) or (status.state == "Invalid" and job is None)  # what runs is looked after
    return over and status.observed_generation == generation


def is_refused(resource: Object) -> bool:
    """Whether it is not tried as it stands; labels, annotations and the operator's settings change no generation.

    So whatever comes of such a job has it judged anew.
    """
    return status_before(resource).state == "Invalid"


def wants_pods(
    resource: Object, job: JobView | None, now: datetime, interval_seconds: float = _PROGRESS_INTERVAL_SECONDS
) -> bool:
    """Whether this look needs the list of pods: not while everything goes its usual way."""
    if job is None:
        return False
    before = status_before(resource)
    if job.failed or job.terminating or job.complete or job.failure or job.suspended:
        return True
    if run_policy(resource).get("suspend") or before.state in {"Suspending", "Suspended", "Restarting"}:
        return True
    if not is_true(before, "Running"):
        if before.attempts:  # resumed: only the pods themselves tell that a new attempt has begun
            return True
        return job.ready < job.nodes and (now - job.created).total_seconds() >= PATIENCE_SECONDS
    return job.ready + job.succeeded < job.nodes or is_due(before, now, interval_seconds)


def seconds_to_live(resource: Object, now: datetime) -> float | None:
    """Until ``runPolicy.ttlSecondsAfterFinished`` is over, counted from the end of the job; ``None``: for ever."""
    ttl = run_policy(resource).get("ttlSecondsAfterFinished")
    status = status_before(resource)
    ended = next((c for c in status.conditions if c.type in {"Complete", "Failed"} and c.status == "True"), None)
    finished = parse_time(ended.last_transition_time) if ended else None
    if ttl is None or finished is None:
        return None
    return float(ttl) - (now - finished).total_seconds()


def dump(status: FineTuneJobStatus) -> dict[str, Any]:
    """The status as it is written."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch that turns one dumped status into another: what is gone, at any depth, becomes null."""
    patch: dict[str, Any] = {}
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        patch[name] = changes(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
    return patch


# ---- parts --------------------------------------------------------------------------------------------------------


def _is_over(status: FineTuneJobStatus) -> bool:
    return is_true(status, "Complete") or is_true(status, "Failed")


def derive_ended(observed: Observed) -> Verdict:
    """Nothing changes any more; a new generation is acknowledged."""
    before = status_before(observed.resource)
    generation = {"observed_generation": observed.generation}
    conditions = tuple(known.model_copy(update=generation) for known in before.conditions)  # `kubectl wait` reads these
    after = before.model_copy(update={**generation, "conditions": conditions})
    life = seconds_to_live(observed.resource, observed.now)
    if life is None:
        return Verdict(after)
    return Verdict(after, commands=(DeleteResource(),)) if life <= 0 else Verdict(after, look_again_seconds=life)


def _status(at: Situation, judgement: Judgement, problems: Sequence[Problem]) -> FineTuneJobStatus:
    before, now = at.before, time_text(at.now)
    verdict = _refused(problems) if problems else Say(True, "Accepted", "the spec is valid")
    accepted = {"Accepted": verdict, "Stalled": Say(False, "Accepted")}
    shows_progress = _shows_progress(at, judgement)
    fresh = shows_progress or judgement.at_once or judgement.state not in {"Running", "Publishing"}
    checkpoint = at.checkpoint() if fresh else before.checkpoint
    if at.view and checkpoint and before.progress and checkpoint.step > before.progress.step:
        shows_progress = True  # the step of a checkpoint was reached: an attempt that ends unseen has got so far
    return FineTuneJobStatus(
        observed_generation=at.observed.generation,
        state=judgement.state,
        message=judgement.message if fresh else before.message,
        plan=_plan(at),
        progress=_progress(at, judgement) if shows_progress else before.progress,
        attempts=at.ledger.attempts,
        total_attempts=at.ledger.total or None,
        restarts=restart_rows(at.ledger.restarts),
        checkpoint=checkpoint,
        artifacts=judgement.artifacts or before.artifacts,
        metrics=judgement.metrics or before.metrics,
        conditions=merge(before.conditions, {**accepted, **judgement.conditions}, at.observed.generation, now),
    )


def _shows_progress(at: Situation, judgement: Judgement) -> bool:
    """Whether steps and losses may be written: at most once per interval while the state stays the same."""
    return judgement.ended or judgement.state != at.before.state or (at.view is not None and at.progress_due)


def _progress(at: Situation, judgement: Judgement) -> StatusProgress | None:
    known = _numbers(at)
    if known is None or not judgement.ended:
        return known
    said = [pod.termination.step for pod in at.newest if pod.termination and pod.termination.step is not None]
    update: dict[str, Any] = {"eta_seconds": None, "phase": judgement.state, "step": max([known.step, *said])}
    return known.model_copy(update=update)


def _numbers(at: Situation) -> StatusProgress | None:
    """While ranks load after a restart, the numbers of the attempt before still stand."""
    before, view = at.before.progress, at.view
    if view is None or view.has_steps or before is None:
        return before if view is None else view.progress
    loading: dict[str, Any] = {"phase": view.progress.phase, "updated_at": view.progress.updated_at}
    return before.model_copy(update={**loading, "eta_seconds": None, "tokens_per_second": None})


def _plan(at: Situation) -> StatusPlan | None:
    """The plan as completed by a launcher, once one has; never less than what was known."""
    said = [pod.termination.plan for pod in at.observed.pods or () if pod.termination and pod.termination.plan]
    completed = at.view.plan if at.view is not None and at.view.plan is not None else next(iter(said), None)
    if completed is not None:
        return status_plan(completed)
    if at.plan is None:
        return at.before.plan
    planned, known = status_plan(at.plan), at.before.plan
    if known is None or known.total_steps is None:
        return planned
    return known.model_copy(update={"nodes": planned.nodes}) if known.world_size == planned.world_size else planned
