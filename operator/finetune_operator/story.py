"""Events: what ``kubectl describe`` tells. Each comes from a difference between two statuses, so none repeats. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune_api.status import FineTuneJobStatus
from finetune_operator.failures import policy
from finetune_operator.observe import Observed
from finetune_operator.sentences import count, cut
from finetune_operator.situation import condition, is_true
from finetune_operator.verdict import Event, EventType

PATIENCE_SECONDS = 3.0  # a job that is still pending then waits for something
_NOT_WORTH_TELLING = {"PodsStarting", "JobMissing", "Restarting"}


@dataclass(frozen=True)
class Change:
    """A status and the one before it."""

    before: FineTuneJobStatus
    after: FineTuneJobStatus
    observed: Observed

    def became(self, kind: str) -> bool:
        """Whether a condition became True."""
        return is_true(self.after, kind) and not is_true(self.before, kind)


def story(change: Change) -> tuple[Event, ...]:
    """The events of a change, in the order in which they are told."""
    told = [event for tell in CHAPTERS for event in tell(change)]
    return tuple(Event(event.reason, cut(event.message), event.type) for event in told)


def _resumed(change: Change) -> Iterator[Event]:
    was = is_true(change.before, "Suspended") or change.before.state == "Suspending"
    if was and change.after.state not in {"Suspending", "Suspended", "Complete", "Failed"}:
        yield Event("Resumed", "the job is no longer suspended")


def _waiting(change: Change) -> Iterator[Event]:
    job = change.observed.job
    if change.after.state not in {"Pending", "Starting", "Restarting"} or job is None:
        return
    if (change.observed.now - job.created).total_seconds() < PATIENCE_SECONDS or change.observed.pods is None:
        return
    now, was = condition(change.after, "PodsReady"), condition(change.before, "PodsReady")
    if now is None or now.status != "False" or now.reason in _NOT_WORTH_TELLING:
        return
    if was is None or was.reason != now.reason:
        yield Event("Waiting", now.message, EventType.WARNING if now.reason in _TROUBLE else EventType.NORMAL)


_TROUBLE = {
    "Unschedulable",
    "ImagePullError",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "QuotaExceeded",
    "PodsRefused",
    "VolumeNotReady",
}


_NO_RESTART = {"Suspended", "Completed"}


def _restarting(change: Change) -> Iterator[Event]:
    if change.after.state in {"Complete", "Failed", "Suspending", "Suspended"}:
        return
    told = {attempt.number for attempt in change.before.attempts if attempt.ended_at is not None}
    for attempt in change.after.attempts:
        if attempt.ended_at is not None and attempt.number not in told and attempt.cause not in _NO_RESTART:
            why = attempt.message or policy(attempt.cause or "").words
            at = f" at step {attempt.last_step}" if attempt.last_step is not None else ""
            yield Event("Restarting", f"attempt {attempt.number} ended{at} ({attempt.cause}): {why}", EventType.WARNING)


def _running(change: Change) -> Iterator[Event]:
    if not change.became("Running"):
        return
    plan, number = change.after.plan, change.after.total_attempts or 1
    method = change.observed.resource["spec"].get("method", {}).get("type", "")
    nodes = count(plan.nodes or 1, "pod") if plan is not None else ""
    shape = f"{plan.strategy}, {method}, world size {plan.world_size} on {nodes}" if plan is not None else method
    again = f"attempt {number} runs: " if number > 1 else "runs: "
    yield Event("Running", again + shape)


def _publishing(change: Change) -> Iterator[Event]:
    if change.after.state == "Publishing" and change.before.state != "Publishing":
        yield Event("Publishing", "training is over; the artifact is being published")


def _suspending(change: Change) -> Iterator[Event]:
    if change.after.state == "Suspending" and change.before.state != "Suspending":
        yield Event("Suspending", change.after.message or "")


def _suspended(change: Change) -> Iterator[Event]:
    if change.became("Suspended"):
        yield Event("Suspended", change.after.message or "")


def _complete(change: Change) -> Iterator[Event]:
    if change.became("Complete"):
        yield Event("Complete", change.after.message or "")


def _failed(change: Change) -> Iterator[Event]:
    if change.became("Failed"):
        yield Event("Failed", change.after.message or "", EventType.WARNING)


CHAPTERS: tuple[Callable[[Change], Iterator[Event]], ...] = (
    _resumed,
    _restarting,
    _waiting,
    _running,
    _publishing,
    _suspending,
    _suspended,
    _complete,
    _failed,
)
