"""``finetune logs --first-error``: which rank failed first, why, and what it said last."""

from __future__ import annotations

from dataclasses import dataclass

from kubernetes.client import ApiException

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError, Request
from finetune.cluster.job import FAILED, INVALID, Job
from finetune.cluster.pods import CONTAINER, TrainerPod, trainer_pods
from finetune.result import decisive
from finetune_api.exits import Cause, ExitClass
from finetune_api.report import Termination
from finetune_api.status import StatusAttempt

LAST_LINES = 20
_FINE = frozenset({ExitClass.COMPLETED.value, ExitClass.INTERRUPTED.value, "Suspended"})


@dataclass(frozen=True)
class FirstError:
    """The cause of the newest failure. ``pod`` is empty where it is gone."""

    attempt: StatusAttempt | None
    pod: str
    node: str
    termination: Termination | None
    last_lines: tuple[str, ...] = ()


def find_first_error(cluster: Cluster, job: Job) -> FirstError | None:
    """The guilty pod and rank of the newest failed attempt, by the ledger and the launchers' last words.

    ``None``: nothing failed.
    """
    attempt = failed_attempt(job)
    pods = [pod for pod in trainer_pods(cluster.pods(job)) if pod.ended]
    pod = guilty_pod(pods, attempt)
    if pod is None:
        return FirstError(attempt, attempt.pod or "", attempt.node or "", None) if attempt else None
    lines = pod.termination.last_lines if pod.termination else ()
    return FirstError(attempt, pod.name, pod.node, pod.termination, lines or _tail(cluster, pod))


def failed_attempt(job: Job) -> StatusAttempt | None:
    """The newest attempt that ended other than well or by request."""
    failed = [known for known in job.status.attempts if known.cause and known.cause not in _FINE]
    return failed[-1] if failed else None


def guilty_pod(pods: list[TrainerPod], attempt: StatusAttempt | None) -> TrainerPod | None:
    """The pod that the ledger names, else the one whose launcher knows the cause rather than an echo of it."""
    if attempt is not None and attempt.pod:
        named = [pod for pod in pods if pod.name == attempt.pod]
        if named:
            return named[-1]
    failed = [pod for pod in pods if pod.exit_code not in {0, None} and not _asked_for(pod)]
    if attempt is not None and attempt.gang:
        failed = [pod for pod in failed if pod.termination and pod.termination.gang == attempt.gang] or failed
    told = [pod for pod in failed if pod.termination is not None]
    if not told:
        return failed[-1] if failed else None
    newest = max(told, key=lambda pod: pod.created)
    together = [pod for pod in told if _same_attempt(pod, newest)]
    chosen = decisive([pod.termination for pod in together if pod.termination])
    return next(pod for pod in together if pod.termination is chosen)


def _asked_for(pod: TrainerPod) -> bool:
    return pod.termination is not None and pod.termination.exit_class.cause is Cause.INTERRUPTION


def _same_attempt(left: TrainerPod, right: TrainerPod) -> bool:
    assert left.termination is not None
    assert right.termination is not None
    return left.termination.gang == right.termination.gang


def _tail(cluster: Cluster, pod: TrainerPod) -> tuple[str, ...]:
    request = Request("get", "pods/log", cluster.namespace, pod.name)
    try:
        text = cluster.ask(request, _read, cluster, pod)
    except ClusterError:  # the node is gone; the ledger still tells the story
        return ()
    return tuple(text.decode("utf-8", errors="replace").splitlines())  # a process may be killed amid a letter


def _read(cluster: Cluster, pod: TrainerPod, *, _request_timeout: tuple[float, float]) -> bytes:
    answer = cluster.pod_log(pod.name, [("container", CONTAINER), ("tailLines", LAST_LINES)], _request_timeout)
    text: bytes = answer.read()
    if answer.status != 200:
        raise ApiException(status=answer.status, reason=answer.reason)
    return text


def nothing_ran_screen(job: Job) -> str:
    """Of a job without a failed attempt: every problem of its spec, or why it has failed all the same."""
    if job.ended == INVALID:
        accepted = job.condition("Accepted")
        problems = (accepted.message if accepted and accepted.message else job.message).splitlines()
        return "\n".join([f"{job.name}: the spec is invalid and nothing has run", *(f"  {line}" for line in problems)])
    if job.ended == FAILED:
        return f"{job.name}: failed: {job.message}"
    return f"{job.name}: nothing has failed"


def first_error_screen(name: str, error: FirstError) -> str:
    """What failed, where, why and its last lines."""
    lines = [_title(name, error)]
    ended = error.termination
    if ended is not None:
        lines.append(f"{ended.exit_class.value}: {ended.message}" + (f"; {ended.hint}" if ended.hint else ""))
    elif error.attempt is not None and error.attempt.message:
        lines.append(f"{error.attempt.cause}: {error.attempt.message}")
    if not error.pod:
        lines.append("its pod is gone and the output with it")
    rank = ended.guilty_rank if ended else None
    prefix = f"rank {rank} | " if rank is not None else "| "
    return "\n".join([*lines, *(f"  {prefix}{line}" for line in error.last_lines)])


def _title(name: str, error: FirstError) -> str:
    attempt, ended = error.attempt, error.termination
    parts = [f"{name}:"]
    if attempt is not None:
        parts.append(f"attempt {attempt.number} failed")
    else:
        parts.append("failed")
    step = ended.step if ended and ended.step is not None else attempt.last_step if attempt else None
    if step is not None:
        parts.append(f"at step {step}")
    if ended is not None and ended.phase is not None:
        parts.append(f"in phase {ended.phase.value}")
    if ended is not None and ended.guilty_rank is not None:
        parts.append(f"on rank {ended.guilty_rank}")
    if error.pod:
        parts.append(f"in pod {error.pod}" + (f" on node {error.node}" if error.node else ""))
    return " ".join(parts)
