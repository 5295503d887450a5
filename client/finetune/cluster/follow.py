"""A job in a cluster behind the same progress bar as a local run."""

from __future__ import annotations

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError
from finetune.cluster.job import COMPLETE, Job
from finetune.cluster.status_view import progress_numbers, total_steps
from finetune.progress_view import Snapshot, View
from finetune.result import Artifacts, RunResult, RunState

_LOOP = frozenset({"Training", "Evaluating", "Checkpointing"})
_STATE_WORDS = {
    "Unseen": "waiting for the operator",
    "Pending": "pending",
    "Starting": "starting",
    "Running": "training",
    "Suspending": "writing a checkpoint before suspension",
    "Suspended": "suspended",
    "Restarting": "restarting",
    "Publishing": "publishing",
    "Deleting": "being deleted",
}
_PHASE_WORDS = {"Evaluating": "evaluating", "Checkpointing": "writing a checkpoint", "Training": "training"}


def follow(cluster: Cluster, name: str, view: View) -> Job:
    """Show the job's progress until it has ended, and return it.

    Raises:
        ClusterError: it was deleted, or the API server stayed away.
    """
    told = 0
    for job in cluster.follow(name):
        if job is None:
            raise ClusterError(f"the FineTuneJob '{name}' was deleted before it had ended")
        told = _tell_attempts(job, told, view)
        view.show(snapshot_of(job))
        if job.ended is not None:
            return job
    raise AssertionError("a follower without a deadline ends with the job")


def _tell_attempts(job: Job, told: int, view: View) -> int:
    """A sentence for each attempt that ended since, unless it was the job's end."""
    for attempt in job.status.attempts:
        if attempt.number <= told or attempt.ended_at is None:
            continue
        told = attempt.number
        if job.ended is None:
            at = f" at step {attempt.last_step}" if attempt.last_step is not None else ""
            why = f": {attempt.message}" if attempt.message else ""
            view.say(f"attempt {attempt.number} ended{at} ({attempt.cause or 'unknown'}){why}")
    return told


def snapshot_of(job: Job) -> Snapshot:
    """What the operator says, as the views show it."""
    state, progress = job.state, job.status.progress
    phase = (progress.phase or "") if progress else ""
    words = _STATE_WORDS.get(state, state.lower())
    if state == "Running" and phase:
        words = _PHASE_WORDS.get(phase, words)
    attempts = len(job.status.attempts)
    newest = max((attempt.number for attempt in job.status.attempts), default=attempts)
    kind = "loop" if state == "Running" and (not phase or phase in _LOOP) else f"{state}{phase}"
    trains = state in {"Running", "Publishing", "Suspending"} and progress is not None and bool(total_steps(job))
    if not trains:
        # the message names what is waited for, and a new reason is news
        said = f"{words}: {job.message}" if job.message else words
        return Snapshot(f"{kind}{job.message}", said)
    assert progress is not None
    words += f" (attempt {newest})" if newest > 1 else ""
    return Snapshot(kind, words, progress.step, total_steps(job) or 0, tuple(progress_numbers(progress)))


def result_of(job: Job) -> RunResult:
    """The one JSON object of ``finetune run --on kubernetes --output json``."""
    status = job.status
    artifacts = None
    if job.ended == COMPLETE and status.artifacts is not None:
        artifacts = Artifacts(**status.artifacts.model_dump())
    values = status.metrics.model_dump(by_alias=True, exclude_none=True) if status.metrics else {}
    return RunResult(
        state=RunState.COMPLETED if job.ended == COMPLETE else RunState.FAILED,
        exit_class=job.exit_class,
        message=job.message or f"the job is {job.ended}",
        step=status.progress.step if status.progress else None,
        artifacts=artifacts,
        metrics={name: float(value) for name, value in values.items()},
        job=f"{job.namespace}/{job.name}",
    )
