"""``finetune wait``: until a condition holds, with an exit code that says how it went."""

from __future__ import annotations

import time

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError, JobNotFound, WaitTimeout
from finetune.cluster.job import COMPLETE, Job
from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_api.names import nearest

DELETED = "Deleted"
CONDITIONS = ("Accepted", "PodsReady", "Running", "Suspended", "ArtifactsPublished", "Complete", "Failed")
_PASSED_BY = frozenset({"Accepted", "PodsReady", "Running", "ArtifactsPublished"})  # a complete job had them all


class JobEnded(FineTuneError):
    """The job ended without what was waited for; the exit code is that of its exit class."""

    def __init__(self, message: str, exit_class: ExitClass, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_class = exit_class


def parse_target(text: str) -> str:
    """``Complete``, ``condition=Complete`` (as kubectl writes it) or ``Deleted``, in any letter case.

    Raises:
        ClusterError: no such condition.
    """
    word = text.removeprefix("condition=")
    known = (*CONDITIONS, DELETED)
    found = next((name for name in known if name.lower() == word.lower()), None)
    if found is None:
        guess = nearest(word, known)
        raise ClusterError(
            f"'{text}' is nothing a job can be waited for",
            f"did you mean {guess}?" if guess else f"known are {', '.join(known)}",
        )
    return found


def wait_for(cluster: Cluster, name: str, target: str, timeout_seconds: float | None) -> Job | None:
    """Block until ``target`` holds and return the job (``None`` for Deleted, also if there is no such job).

    Raises:
        JobEnded: it never will; carries the exit class of the job.
        WaitTimeout: not within ``timeout_seconds``.
    """
    try:
        return _wait_for(cluster, name, target, timeout_seconds)
    except JobNotFound:
        if target == DELETED:
            return None
        raise


def _wait_for(cluster: Cluster, name: str, target: str, timeout_seconds: float | None) -> Job | None:
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    last: Job | None = None
    for job in cluster.follow(name, deadline):
        if job is None:
            if target == DELETED:
                return None
            raise ClusterError(f"the FineTuneJob '{name}' was deleted before it was {target}")
        last = job
        if _reached(job, target):
            return job
        if job.ended is not None and target != DELETED:
            raise _never(job, target)
    assert last is not None
    raise WaitTimeout(
        f"the FineTuneJob '{name}' was not {target} within {timeout_seconds:g} s; it is {last.state}"
        + (f": {last.message}" if last.message else "")
    )


def _reached(job: Job, target: str) -> bool:
    if job.ended == COMPLETE and target in _PASSED_BY:
        return True
    if target in {COMPLETE, "Failed"}:
        return job.ended == target or (target == "Failed" and job.ended is not None and job.ended != COMPLETE)
    return job.holds(target)


def _never(job: Job, target: str) -> FineTuneError:
    said = f": {job.message}" if job.message else ""
    message = f"the FineTuneJob '{job.name}' is {job.ended} and will not be {target}{said}"
    return ClusterError(message) if job.ended == COMPLETE else JobEnded(message, job.exit_class)
