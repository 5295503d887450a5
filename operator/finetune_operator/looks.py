"""What a look at a job has to read, and whether it is worth looking at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_operator.derive import is_settled, wants_pods
from finetune_operator.observe import JobView


@dataclass(frozen=True)
class Wanted:
    """What to read besides what the watches said."""

    pods: bool
    progress: bool


def wanted(resource: Mapping[str, Any], job: JobView | None, now: datetime, knows_pods: bool) -> Wanted:
    """Pods are LISTed when a decision may depend on them; progress is pulled from the pods known last."""
    if job is None or is_settled(resource):
        return Wanted(False, False)
    lives = job.active > 0 and not job.suspended
    pods = wants_pods(resource, job, now) or (lives and job.ready >= job.nodes and not knows_pods and _runs(resource))
    return Wanted(pods, lives and (pods or knows_pods))


def is_over(job: JobView | None) -> bool:
    """Whether no pod of the Job will run any more by itself."""
    return job is None or job.suspended or job.complete or job.failure is not None or job.deleting


def _runs(resource: Mapping[str, Any]) -> bool:
    return bool(resource.get("status", {}).get("state") == "Running")
