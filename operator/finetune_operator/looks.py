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
from finetune_operator.store import Traffic

_LOOKS_PER_SECOND = 20.0
"""Of all jobs together. Each costs a LIST, a page per pod and a status: many live jobs are looked at less often."""
_LOOKS_PER_SECOND_IN_A_RUSH = 4.0
_SILENCE_PER_STARTING_JOB_SECONDS, _LONGEST_SILENCE_SECONDS = 0.1, 60.0  # of a new job: its turn will come
_SILENCE_IN_A_RUSH_SECONDS = 120.0
_ASK_AGAIN_SECONDS = 15.0  # a rush may be over by then
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
    if job is None or is_settled(resource, job):
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


def seconds_until_next_look(state: str | None, wanted_seconds: float | None, traffic: Traffic) -> float | None:
    """What a job asks for; longer where there are so many that their looks would crowd out news.

    Only looks that nothing has happened for: news are looked at when they come.
    """
    if wanted_seconds is None or state not in _PATIENT:
        return wanted_seconds
    others = traffic.starting if state in {"Pending", "Starting"} else traffic.live
    return max(wanted_seconds, others / _LOOKS_PER_SECOND)


def seconds_after_listing(traffic: Traffic) -> float:
    """How long a calm job that was listed after a start may wait: not all are looked at at once."""
    return traffic.live / _LOOKS_PER_SECOND


def seconds_too_early(resource: Mapping[str, Any], job: JobView | None, now: datetime, traffic: Traffic) -> float:
    """How long a job that goes its usual way can do without a look; 0: look at it now.

    Asking a thousand jobs what they wait for, or how far they are, would only make all of them wait longer.
    """
    if job is None or "deletionTimestamp" in resource["metadata"]:
        return 0.0
    if is_calm(resource, job):
        per_second = _LOOKS_PER_SECOND_IN_A_RUSH if traffic.rush else _LOOKS_PER_SECOND
        early = (traffic.live + 2 * traffic.starting) / per_second - _silence(resource["status"], job, now)
        return min(max(0.0, early), _ASK_AGAIN_SECONDS)
    begins = not resource.get("status", {}).get("conditions") and job.ready < job.nodes
    if not begins or job.failed or job.terminating or is_over(job) or run_policy(resource).get("suspend"):
        return 0.0
    silence = min(traffic.starting * _SILENCE_PER_STARTING_JOB_SECONDS, _LONGEST_SILENCE_SECONDS)
    early = (_SILENCE_IN_A_RUSH_SECONDS if traffic.rush else silence) - (now - job.created).total_seconds()
    return min(max(0.0, early), _ASK_AGAIN_SECONDS)


def _silence(status: Mapping[str, Any], job: JobView, now: datetime) -> float:
    """Seconds since a page of progress was written, or since the attempt began."""
    attempts = status.get("attempts") or [{}]
    said = status.get("progress", {}).get("updatedAt") or attempts[-1].get("startedAt")
    return (now - (parse_time(said) or job.created)).total_seconds()
