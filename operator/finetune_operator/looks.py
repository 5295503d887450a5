"""What a look at a job has to read, and whether it is worth looking at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator.derive import is_settled, wants_pods
from finetune_operator.observe import JobView, parse_time
from finetune_operator.settings import OperatorSettings
from finetune_operator.situation import run_policy

CALM_LOOKS_PER_SECOND = 20.0
"""Of all jobs together. Each costs a LIST, a page per pod and a status: many live jobs are looked at less often."""
_PATIENT = {"Pending", "Starting", "Running", "Publishing"}


@dataclass(frozen=True)
class Wanted:
    """What to read besides what the watches said."""

    pods: bool
    progress: bool


def wanted(
    resource: Mapping[str, Any], job: JobView | None, now: datetime, knows_pods: bool, settings: OperatorSettings
) -> Wanted:
    """Pods are LISTed when a decision may depend on them; progress is pulled from the pods known last."""
    if job is None or is_settled(resource):
        return Wanted(False, False)
    lives = job.active > 0 or job.terminating > 0
    asked = wants_pods(resource, job, now, settings.progress.interval_seconds)
    pods = asked or (lives and job.ready >= job.nodes and not knows_pods and _runs(resource))
    return Wanted(pods, lives and (pods or knows_pods))


def is_over(job: JobView | None) -> bool:
    """Whether no pod of the Job will run any more by itself."""
    return job is None or job.suspended or job.complete or job.failure is not None or job.deleting


def _runs(resource: Mapping[str, Any]) -> bool:
    return bool(resource.get("status", {}).get("state") == "Running")


def is_calm(resource: Mapping[str, Any], job: JobView | None) -> bool:
    """Whether the job runs, its status says so, and nothing has happened to it since."""
    if job is None or not _runs(resource) or is_over(job) or job.terminating or job.ready < job.nodes:
        return False
    return bool(resource["status"].get("observedGeneration") == resource["metadata"].get("generation"))


def seconds_until_next_look(state: str | None, wanted_seconds: float | None, live: int, starting: int) -> float | None:
    """What a job asks for; longer where so many are ``live`` (or ``starting``) that their looks would crowd out news.

    Only looks that nothing has happened for: news are looked at when they come.
    """
    if wanted_seconds is None or state not in _PATIENT:
        return wanted_seconds
    others = starting if state in {"Pending", "Starting"} else live
    return max(wanted_seconds, others / CALM_LOOKS_PER_SECOND)


def seconds_too_early(
    resource: Mapping[str, Any], job: JobView | None, now: datetime, live: int, starting: int
) -> float:
    """How long a job that goes its usual way can do without a look; 0: look at it now.

    Asking a thousand jobs what they wait for, or how far they are, would only make all of them wait longer.
    """
    if job is None or "deletionTimestamp" in resource["metadata"]:
        return 0.0
    if is_calm(resource, job):
        return max(0.0, (live + 2 * starting) / CALM_LOOKS_PER_SECOND - _silence(resource["status"], job, now))
    begins = not resource.get("status", {}).get("conditions") and job.ready < job.nodes
    if not begins or job.failed or job.terminating or is_over(job) or run_policy(resource).get("suspend"):
        return 0.0
    return max(0.0, starting / CALM_LOOKS_PER_SECOND - (now - job.created).total_seconds())


def _silence(status: Mapping[str, Any], job: JobView, now: datetime) -> float:
    """Seconds since a page of progress was written, or since the attempt began."""
    attempts = status.get("attempts") or [{}]
    said = status.get("progress", {}).get("updatedAt") or attempts[-1].get("startedAt")
    return (now - (parse_time(said) or job.created)).total_seconds()
