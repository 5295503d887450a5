"""How attempts ended: facts from pods, from launchers, and from what is missing. Pure; the ledger folds them."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from finetune_api.exits import ExitClass
from finetune_api.report import EndedAttempt
from finetune_api.status import FineTuneJobStatus
from finetune_operator.failures import PodCause, is_user_error
from finetune_operator.observe import TRAINER, Object, Observed, PodView, parse_time
from finetune_operator.sentences import as_sentence, unix_time

_DISRUPTIONS = {
    "PreemptionByScheduler": PodCause.PREEMPTED,
    "DeletionByTaintManager": PodCause.NODE_LOST,
    "DeletionByPodGC": PodCause.NODE_LOST,
    "EvictionByEvictionAPI": PodCause.DRAINED,
    "TerminationByKubelet": PodCause.EVICTED,
}
_REASONS = {  # of a pod's status
    "Evicted": PodCause.EVICTED,
    "NodeLost": PodCause.NODE_LOST,
    "Preempting": PodCause.PREEMPTED,
    "NodeShutdown": PodCause.DRAINED,
    "Terminated": PodCause.DRAINED,
}
_REJECTIONS = frozenset(  # of a kubelet that does not admit a pod; besides them every word that begins with OutOf
    {
        "AppArmor",
        "InitContainerRestartPolicyForbidden",
        "InvalidNodeInfo",
        "NodeAffinity",
        "NodeName",
        "NodePorts",
        "PodFeatureUnsupported",
        "PodOSNotSupported",
        "PodOSSelectorNodeLabelDoesNotMatch",
        "SMTAlignmentError",
        "SupplementalGroupsPolicyNotSupported",
        "SysctlForbidden",
        "TaintToleration",
        "TopologyAffinityError",
        "UnexpectedAdmissionError",
        "UnexpectedPredicateFailureType",
        "UnknownReason",
        "VolumeNodeAffinity",
        "node(s) had taints that the pod didn't tolerate",
    }
)
_REJECTED = "Pod was rejected: "  # how a kubelet begins the message of any of them
_OUTGROWN = re.compile(
    r'Usage of EmptyDir volume "(?P<volume>[^"]+)" exceeds the limit'
    r"|Container (?P<container>\S+) exceeded its local ephemeral storage limit"
    r"|Pod ephemeral local storage usage exceeds the total limit of containers"
)
SIZED_BY = {  # volumes of the pod, and the field of spec.resources that bounds them
    "work": "scratch",
    "tmp": "scratch",
    "shm": "sharedMemory",
}
FORCE_AFTER_SECONDS = 10  # past the end of the grace period: the node will not confirm any more


@dataclass(frozen=True)
class End:
    """One end that somebody saw. Several may belong to one attempt."""

    cause: str
    ended_at: datetime
    message: str
    gang: str = ""
    started_at: datetime | None = None  # of the attempt
    uid: str = ""  # short uid of the pod that ended; empty for ranks restarted in place
    created: datetime | None = None  # of the pod
    pod: str = ""
    node: str = ""
    exit_code: int | None = None
    resumed_from_step: int | None = None
    last_step: int | None = None


def short_uid(uid: str) -> str:
    """Enough of a uid to tell the pods of one job apart."""
    return uid[:8]


def stopping(observed: Observed) -> bool:
    """Whether the pods are asked to go away, by the owner or by a queue."""
    return _suspend_asked(observed) or (observed.job is not None and observed.job.suspended)


def _suspend_asked(observed: Observed) -> bool:
    return bool(observed.resource.get("spec", {}).get("runPolicy", {}).get("suspend"))


def _was_stopping(observed: Observed, pod: PodView | None) -> bool:
    """Whether the pods were asked to go by a suspension that is over already: they leave after the job was resumed.

    The status is what the look before saw. The Job itself tells of a suspension that no look saw, or not in time.
    """
    job = observed.job
    if (observed.resource.get("status") or {}).get("state") == "Suspending" or (job is not None and job.held):
        return True
    asked = pod.asked_to_go if pod is not None else None
    return asked is not None and job is not None and job.resumed is not None and asked <= job.resumed


def is_lost(pod: PodView, now: datetime) -> bool:
    """Whether a pod's node will not confirm its end: the grace period is long over."""
    return pod.deleted is not None and not pod.ended and (now - pod.deleted).total_seconds() > FORCE_AFTER_SECONDS


def publisher(pods: Iterable[PodView]) -> PodView | None:
    """The pod that ended after the artifact was read back and verified: what others do then ends no attempt."""
    over = (pod for pod in pods if pod.phase == "Succeeded" and pod.termination and pod.finished)
    return next((pod for pod in over if pod.termination and pod.termination.artifact_manifest_sha256), None)


def published_at(before: FineTuneJobStatus, newest: Iterable[PodView]) -> datetime | None:
    """When that pod ended; the status still knows after the pod is gone."""
    if first := publisher(newest):
        return first.finished
    last = before.attempts[-1] if before.artifacts and before.attempts else None
    return parse_time(last.ended_at) if last else None


def ends(observed: Observed) -> list[End]:
    """Every end that pods and launchers tell of, oldest first. Nothing may be concluded from pods not looked at."""
    pods = observed.pods or ()
    by_index = {pod.index: pod for pod in sorted(pods, key=lambda pod: pod.created)}
    found = [end for pod in pods if (end := _pod_end(pod, observed)) is not None]
    said = [ended for page in observed.progress for ended in page.ended]
    said += [ended for pod in pods if pod.termination for ended in pod.termination.ended]
    found += [_in_place(ended, by_index) for ended in said]
    return sorted(found, key=lambda end: (end.ended_at, end.uid, end.gang))


def gone(observed: Observed, uids: frozenset[str]) -> Iterator[End]:
    """Pods of ``uids`` that are no longer there. Of a complete job they had succeeded: nothing is concluded."""
    if observed.pods is None or observed.job is None or observed.job.complete:
        return
    present = {short_uid(pod.uid) for pod in observed.pods}
    for uid in sorted(uids - present):
        cause, message = _deletion(observed, None)
        yield End(cause, observed.now, message, uid=uid)


def leaving(observed: Observed, uids: frozenset[str]) -> Iterator[End]:
    """Pods of ``uids`` that are asked to go: why the others lost them."""
    for pod in observed.pods or ():
        if short_uid(pod.uid) in uids and pod.deleted is not None and not pod.ended:
            cause, message = _cause(pod, observed)
            yield End(cause, observed.now, message, uid=short_uid(pod.uid), pod=pod.name, node=pod.node)


def _deletion(observed: Observed, pod: PodView | None) -> tuple[PodCause, str]:
    if observed.job is not None and observed.job.failure and observed.job.failure[0] == "DeadlineExceeded":
        return PodCause.DEADLINE_EXCEEDED, "stopped because runPolicy.activeDeadlineSeconds is over"
    if stopping(observed):
        return PodCause.SUSPENDED, "stopped because the job is suspended"
    if _was_stopping(observed, pod):
        return PodCause.SUSPENDED, "stopped because the job was suspended"
    return PodCause.POD_DELETED, "a pod was deleted"


def _in_place(ended: EndedAttempt, by_index: dict[int, PodView]) -> End:
    pod = by_index.get(ended.guilty_node) if ended.guilty_node is not None else None
    return End(
        cause=ended.exit_class.value,
        ended_at=unix_time(ended.ended_at) or datetime.fromtimestamp(0).astimezone(),
        message=as_sentence(ended.message),
        gang=ended.gang,
        started_at=unix_time(ended.started_at),
        pod=pod.name if pod else "",
        node=pod.node if pod else "",
        exit_code=ended.exit_class.code,
        resumed_from_step=ended.resumed_from_step,
        last_step=ended.last_step,
    )


def _pod_end(pod: PodView, observed: Observed) -> End | None:
    lost = is_lost(pod, observed.now)
    if pod.phase != "Failed" and not lost:
        return None
    cause, message = _lost(pod) if lost else _cause(pod, observed)
    said = pod.termination
    return End(
        cause=cause,
        ended_at=pod.finished or pod.failed or pod.deleted or pod.created,  # the same at every look
        message=message,
        gang=said.gang if said else "",
        uid=short_uid(pod.uid),
        created=pod.created,
        pod=pod.name,
        node=pod.node,
        exit_code=pod.exit_code,
        resumed_from_step=said.resumed_from_step if said else None,
        last_step=said.step if said else None,
    )


def _lost(pod: PodView) -> tuple[str, str]:
    where = f"node {pod.node}" if pod.node else "its node"
    return (
        PodCause.NODE_LOST,
        f"pod {pod.name} was given up because {where} has not confirmed its end {FORCE_AFTER_SECONDS} s after its"
        " grace period",
    )


def _cause(pod: PodView, observed: Observed) -> tuple[str, str]:
    """The first that fits: the trainer's word if it is about the input, the cluster's, the owner's, the exit code."""
    said = pod.termination
    if said and is_user_error(said.exit_class.value):
        return said.exit_class.value, with_hint(said.message, said.hint)
    if pod.killed_for_memory and _died_of_it(pod):
        return _out_of_memory(pod, observed)
    interrupted = said is None or said.exit_class == ExitClass.INTERRUPTED
    if interrupted and (outgrown := _outgrown(pod, observed)):
        return outgrown
    if pod.disruption[0] and interrupted:
        cause = _DISRUPTIONS.get(pod.disruption[0], PodCause.EVICTED)
        return (
            cause,
            f"pod {pod.name} was {_done_to(cause, pod)}: {as_sentence(pod.disruption[1] or pod.disruption[0])}",
        )
    if interrupted and (by_reason := _by_reason(pod)):
        why = as_sentence(pod.message.removeprefix(_REJECTED) or pod.reason)
        return by_reason, f"pod {pod.name} was {_done_to(by_reason, pod)}: {why}"
    if interrupted and pod.deleted is not None:  # a pod that died long before is not suspended now
        cause, message = _deletion(observed, pod)
        return cause, f"pod {pod.name} was deleted" if cause == PodCause.POD_DELETED else message
    if said:
        return said.exit_class.value, with_hint(said.message, said.hint)
    return _by_code(pod)


def _died_of_it(pod: PodView) -> bool:
    """Whether the launcher, or a rank without which it could not go on, was killed for memory.

    A runtime marks the container for good once any process of it was: after a rank that was restarted in place too.
    """
    said = pod.termination
    return said is None or pod.exit_code == 128 + signal.SIGKILL or said.exit_class == ExitClass.RANK_KILLED


def _by_reason(pod: PodView) -> PodCause | None:
    """What the reason of the pod's status means, if it is one that Kubernetes gives."""
    known, rejected = _REASONS.get(pod.reason), pod.message.startswith(_REJECTED)
    if known is not None and not (rejected and known == PodCause.EVICTED):  # under pressure nothing is admitted
        return known
    return PodCause.REJECTED if rejected or pod.reason.startswith("OutOf") or pod.reason in _REJECTIONS else None


def _outgrown(pod: PodView, observed: Observed) -> tuple[str, str] | None:
    """The pod wrote more than it may: it would do so again on any node. Nothing if the node itself ran short."""
    found = _OUTGROWN.search(pod.message) if pod.reason == "Evicted" else None
    if found is None or pod.disruption[0] not in {"", "TerminationByKubelet"}:
        return None
    volume, container = found.group("volume"), found.group("container")
    if volume in SIZED_BY:
        field = SIZED_BY[volume]
        advice = "raise it" if _resources(observed).get(field) else "set it to more"
        what = f"it outgrew spec.resources.{field}"
    elif volume is None and container in {None, TRAINER}:
        what = "it outgrew the limit that the namespace sets for ephemeral-storage"
        advice = "only its administrator can raise it: spec.resources.scratch must fit below"
    else:
        return None  # of a container or a volume that somebody else has put into the pod
    return PodCause.OUT_OF_SPACE, f"pod {pod.name} was evicted because {what} ({as_sentence(pod.message)}); {advice}"


def _resources(observed: Observed) -> Object:
    resources: Object = observed.resource.get("spec", {}).get("resources") or {}
    return resources


def _out_of_memory(pod: PodView, observed: Observed) -> tuple[str, str]:
    """With a limit the container outgrew it; without one the node ran short, and a neighbour may be to blame."""
    if pod.memory_limit:
        limit, action = f"spec.resources.limits.memory ({pod.memory_limit})", "raise it"
        if not (_resources(observed).get("limits") or {}).get("memory"):
            limit = f"the {pod.memory_limit} that the namespace allows where spec.resources.limits.memory is absent"
            action = "set it"
        return (
            ExitClass.OUT_OF_MEMORY.value,
            f"pod {pod.name} was killed because it needed more host memory than {limit};"
            f" {action}, or lower training.microBatchSize or dataset.maxSequenceLength",
        )
    return (
        PodCause.NODE_OUT_OF_MEMORY,
        f"pod {pod.name} was killed because node {pod.node or 'it ran on'} ran out of memory;"
        " set spec.resources.requests.memory so that enough is kept for it",
    )


def _by_code(pod: PodView) -> tuple[str, str]:
    code = pod.exit_code
    if code is None:
        return PodCause.UNKNOWN, f"pod {pod.name} failed without an exit code{_because(pod)}"
    exit_class = ExitClass.from_code(code)
    if exit_class == ExitClass.RANK_KILLED and code > 128:
        return exit_class.value, f"the launcher in pod {pod.name} was killed by signal {code - 128}"
    word = f"with a last word that cannot be read: {pod.unread}" if pod.unread else "without a last word"
    return exit_class.value, f"pod {pod.name} exited with code {code} {word}{_because(pod)}"


def _because(pod: PodView) -> str:
    text = pod.message or pod.reason
    return f" ({as_sentence(text)})" if text else ""


def _done_to(cause: PodCause, pod: PodView) -> str:
    words = {
        PodCause.PREEMPTED: "preempted",
        PodCause.NODE_LOST: f"lost with node {pod.node}",
        PodCause.DRAINED: "evicted by a drain",
        PodCause.REJECTED: f"rejected by node {pod.node}",
    }
    return words.get(cause, "evicted")


def with_hint(message: str, hint: str) -> str:
    """The launcher's sentence and what it advises."""
    said = as_sentence(message)
    return f"{said} ({as_sentence(hint)})" if hint else said
