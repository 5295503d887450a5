"""What the objects of training pods say: which rank runs where, and how a container ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.report import Termination

CONTAINER = "trainer"
_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True)
class TrainerPod:
    """One pod of a job. ``index`` is the node rank; ``phase`` is that of Kubernetes."""

    name: str
    uid: str
    index: int
    created: datetime
    phase: str
    node: str
    started: bool  # the container has run: there is a log
    ended: bool
    exit_code: int | None
    deleting: bool
    waiting: str
    reason: str  # of a pod that was evicted, or refused by its kubelet
    termination: Termination | None
    replaced: bool = False  # a later pod has the same index


def trainer_pods(pods: Sequence[Any], index: int | None = None) -> list[TrainerPod]:
    """V1Pods of a job (of one node rank), in their order."""
    read = [_read(pod) for pod in pods if _INDEX_LABEL in (pod.metadata.labels or {})]
    newest = {pod.index: pod.uid for pod in read}
    marked = [replace(pod, replaced=newest[pod.index] != pod.uid) for pod in read]
    return [pod for pod in marked if index is None or pod.index == index]


def _read(pod: Any) -> TrainerPod:
    states = [known for known in pod.status.container_statuses or () if known.name == CONTAINER]
    state = states[0].state if states else None
    terminated = state.terminated if state else None
    waiting = state.waiting if state else None
    return TrainerPod(
        name=pod.metadata.name,
        uid=pod.metadata.uid,
        index=int(pod.metadata.labels[_INDEX_LABEL]),
        created=pod.metadata.creation_timestamp,
        phase=pod.status.phase or "Pending",
        node=pod.spec.node_name or "",
        started=bool(state and (state.running or terminated)),
        ended=terminated is not None or pod.status.phase in {"Succeeded", "Failed"},
        exit_code=terminated.exit_code if terminated else None,
        deleting=pod.metadata.deletion_timestamp is not None,
        waiting=": ".join(filter(None, (waiting.reason, waiting.message))) if waiting else "",
        reason=": ".join(filter(None, (pod.status.reason, pod.status.message))),
        termination=_termination(terminated.message if terminated else None),
    )


def _termination(message: str | None) -> Termination | None:
    """The launcher's last word; ``None`` where the container died without one."""
    if not message:
        return None
    try:
        return Termination.model_validate_json(message, extra="ignore")  # a newer trainer may say more
    except ValidationError:
        return None
