"""``finetune logs``: one node's (or rank's) output, followed across restarts, replaced pods and broken connections."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError, ReadTimeoutError
from websocket import WebSocketException

from finetune.cluster import rank_log
from finetune.cluster.api import CONNECT_SECONDS, OUTAGE_SECONDS, Cluster
from finetune.cluster.errors import (
    ClusterError,
    ClusterUnreachable,
    JobNotFound,
    Request,
    is_transient,
    reason_of,
    translate,
)
from finetune.cluster.job import Job
from finetune.cluster.pod_exec import open_exec
from finetune.cluster.pods import CONTAINER, TrainerPod, trainer_pods

LOG_DIRECTORY = "/work/run/logs"
_POLL_SECONDS = 1.0
_REPLACED_TRIES = 2
_TRIES = 3  # failures in a row that are told, and that end the reading once the job has ended
_SILENCE_SECONDS = 30.0  # a stream without a line for so long is opened anew: the connection may be dead
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\S+")
_PROGRAM = Path(rank_log.__file__)


@dataclass
class Reader:
    """Where the output goes, and what was asked for. ``tail`` counts lines of the first pod only."""

    write: Callable[[str], None]  # one line of the log
    say: Callable[[str], None]  # a sentence about it
    follow: bool = True
    tail: int | None = None


@dataclass
class Position:
    """What has been read of one container's log, and what stands in the way of more."""

    stamp: str = ""  # time of the newest line, as the kubelet wrote it
    at_stamp: int = 0  # lines of that very time
    bytes: int = 0  # of a rank's files
    complaint: str = ""  # of the kubelet, in the place of lines
    failures: int = 0  # in a row, without a new line between
    refusals: int = 0  # in a row, without an answer between
    refused_since: float = 0.0
    answered: bool = False  # whoever was asked last
    told: bool = False  # that it is refused
    trouble: str = ""

    def answer(self) -> None:
        """The kubelet answers: whatever breaks now, its output can be read."""
        self.answered, self.refusals, self.told = True, 0, False

    def fail(self, error: Exception, followed: bool) -> None:
        """Count ``error``. A followed stream in which nothing was said for long is no failure."""
        silent = followed and isinstance(getattr(error, "reason", error), ReadTimeoutError)
        if silent and self.answered:
            return
        self.failures += 1
        self.trouble = reason_of(error)
        # A kubelet answers with the first line, and repeats one that is known: before that its silence says nothing.
        if not self.answered and not (silent and not self.stamp):
            self.refused_since = self.refused_since if self.refusals else time.monotonic()
            self.refusals += 1


def node_of_rank(job: Job, rank: int) -> int:
    """The node rank that runs ``rank``.

    Raises:
        ClusterError: the job has fewer ranks.
    """
    world = job.nodes * job.processes_per_node
    if not 0 <= rank < world:
        raise ClusterError(
            f"the FineTuneJob '{job.name}' has no rank {rank}",
            f"its ranks are 0 to {world - 1}" if world > 1 else "name rank 0",
        )
    return rank // job.processes_per_node


def print_logs(cluster: Cluster, name: str, rank: int, reader: Reader) -> None:
    """Print the output of ``rank`` until the job has ended (``reader.follow``), else what there is now.

    Rank 0 writes to its pod's standard output, beside the launcher; other ranks write to files in their pods, which
    are read through exec while the pod runs.

    Raises:
        ClusterError: the output of a pod that nothing replaces cannot be read.
    """
    job = cluster.job(name)
    index = node_of_rank(job, rank)
    if not reader.follow:
        return _print_now(cluster, job, rank, reader)
    seen: dict[str, Position] = {}
    done: set[str] = set()
    waited_for = ""
    while True:
        pod, position = _next_pod(cluster, job, index, done), None
        if pod is not None and pod.ended and not pod.started:
            reader.say(_without_output(pod))
            done.add(pod.uid)
            continue
        if pod is not None and pod.started:
            if pod.uid not in seen:
                reader.say(_title(pod))
            position = seen.setdefault(pod.uid, Position())
            if _read_pod(cluster, pod, rank, position, reader):
                done.add(pod.uid)
            if position.stamp or pod.uid in done:
                reader.tail = None
            if not position.failures or pod.uid in done:
                continue
        fresh = _again(cluster, job)  # also while a pod cannot be read: it must not hide the end of the job
        if fresh is None:
            return reader.say(f"the FineTuneJob '{name}' was deleted")
        if pod is not None and position is not None:
            if _left(pod, position, fresh, reader):
                done.add(pod.uid)
            continue
        if fresh.ended is not None:
            return reader.say(_ended(fresh, bool(seen or done)))
        if (words := _waiting(fresh, pod)) != waited_for:
            reader.say(words)
            waited_for = words
        time.sleep(_POLL_SECONDS)


def _print_now(cluster: Cluster, job: Job, rank: int, reader: Reader) -> None:
    pods = trainer_pods(cluster.pods(job), node_of_rank(job, rank))
    several = sum(pod.started for pod in pods) > 1
    for pod in pods:
        if pod.started:
            if several:
                reader.say(_title(pod))
            _read_pod(cluster, pod, rank, Position(), reader)
        elif pod.ended:
            reader.say(_without_output(pod))
    if not any(pod.started for pod in pods):
        gone = "; its pods are gone and their output with them" if job.ended and not pods else ""
        raise ClusterError(f"the FineTuneJob '{job.name}' has no output; it is {job.state}{gone}", job.message)


def _without_output(pod: TrainerPod) -> str:
    return f"pod {pod.name} ended before its container started" + (f": {pod.reason}" if pod.reason else "")


def _title(pod: TrainerPod) -> str:
    return f"--- pod {pod.name}" + (f" on node {pod.node}" if pod.node else "") + " ---"


def _waiting(job: Job, pod: TrainerPod | None) -> str:
    reason = (pod.waiting if pod else "") or job.message
    return f"waiting: {job.state}" + (f": {reason}" if reason else "")


def _ended(job: Job, shown: bool) -> str:
    said = f": {job.message}" if job.message else ""
    gone = "" if shown else "; its pods are gone and their output with them"
    return f"the FineTuneJob '{job.name}' is {job.ended}{said}{gone}"


def _next_pod(cluster: Cluster, job: Job, index: int, done: set[str]) -> TrainerPod | None:
    """The oldest pod of this node that was not read to its end."""
    listed = _patiently(lambda: cluster.pods(job))
    return next((pod for pod in trainer_pods(listed, index) if pod.uid not in done), None)


def _again(cluster: Cluster, job: Job) -> Job | None:
    try:
        fresh = _patiently(lambda: cluster.job(job.name))
    except JobNotFound:
        return None
    return fresh if fresh.uid == job.uid else None


def _patiently(look: Callable[[], Any]) -> Any:
    """Ask again while the API server is away, for OUTAGE_SECONDS."""
    until = time.monotonic() + OUTAGE_SECONDS
    while True:
        try:
            return look()
        except ClusterError as error:
            cause = error.__cause__
            if not isinstance(cause, Exception) or not is_transient(cause) or time.monotonic() > until:
                raise
            time.sleep(_POLL_SECONDS)


def _read_pod(cluster: Cluster, pod: TrainerPod, rank: int, position: Position, reader: Reader) -> bool:
    """Print until the stream ends; true once nothing more can come from this pod."""
    by_exec = rank != 0 and not pod.ended
    if rank != 0 and pod.ended:
        if position.bytes:
            return True
        if not position.failures:
            reader.say(f"rank {rank}'s own file is gone with its pod; this is the output of the launcher there")
    position.answered = False
    lines = (_rank_lines if by_exec else _lines)(cluster, pod, rank, position, reader)
    while True:
        try:
            line = next(lines, None)
        except (ApiException, HTTPError, OSError, WebSocketException) as error:
            verb, resource = ("create", "pods/exec") if by_exec else ("get", "pods/log")
            request = Request(verb, resource, cluster.namespace, pod.name)
            if _given_up(cluster, request, error, reader):
                return True
            position.fail(error, followed=_is_followed(pod, reader))
            time.sleep(_POLL_SECONDS)
            return False
        position.failures = 0
        if line is None:
            break
        reader.write(line)
    if not pod.ended and reader.follow:  # the container has ended and nobody has said so yet
        time.sleep(_POLL_SECONDS)
    return pod.ended


def _given_up(cluster: Cluster, request: Request, error: Exception, reader: Reader) -> bool:
    """True where the pod is gone; raises where asking again is of no use."""
    status = error.status if isinstance(error, ApiException) else None
    if status == 404:
        return True
    if status is not None and status != 400 and not is_transient(error):  # 400: its container is about to start
        raise translate(error, request, cluster.connection.server) from error
    if not reader.follow:
        raise ClusterError(_unreadable(request.name, reason_of(error)), "try again") from error
    return False


def _left(pod: TrainerPod, position: Position, job: Job, reader: Reader) -> bool:
    """Whether to go on without a pod that could not be read: its node may never answer again.

    Raises:
        ClusterUnreachable: there is nothing to go on to.
    """
    trouble = _unreadable(pod.name, position.trouble)
    if pod.replaced and position.failures >= _REPLACED_TRIES:
        reader.say(f"{trouble}; going on with the pod that replaced it")
        return True
    if job.ended is not None and position.failures >= _TRIES:
        reader.say(_ended(job, shown=True))
        raise ClusterUnreachable(trouble)
    if position.refusals and time.monotonic() - position.refused_since > OUTAGE_SECONDS:
        raise ClusterUnreachable(trouble, f"this has lasted {OUTAGE_SECONDS:g} s and the job is {job.state}")
    if position.refusals >= _TRIES and not position.told:
        reader.say(f"{trouble}; trying again")
        position.told = True
    return False


def _unreadable(pod: str, why: str) -> str:
    return f"the output of pod {pod} cannot be read: {why}"


def _is_followed(pod: TrainerPod, reader: Reader) -> bool:
    """Whether more may be written to its standard output."""
    return reader.follow and not pod.ended and not pod.replaced


def _lines(cluster: Cluster, pod: TrainerPod, _rank: int, position: Position, reader: Reader) -> Iterator[str]:
    """New lines of the pod's standard output. A stream that is taken up again overlaps; lines known are left out."""
    answer = _stream(cluster, pod, position, reader)
    try:
        if answer.status != 200:
            refused = ApiException(status=answer.status, reason=answer.reason)
            refused.body = answer.read().decode("utf-8", errors="replace")
            raise refused
        position.answer()
        yield from new_lines(_split(answer.stream(4096, decode_content=False)), position, reader.say)
    finally:
        answer.close()
        answer.release_conn()


def _stream(cluster: Cluster, pod: TrainerPod, position: Position, reader: Reader) -> Any:
    """From the newest known line on (``sinceTime`` is of the kubelet's own clock, so nobody else's matters).

    That line is told again, so that a kubelet that lives answers at once.
    """
    query: list[tuple[str, Any]] = [
        ("container", CONTAINER),
        ("timestamps", True),
        ("follow", _is_followed(pod, reader)),
    ]
    if position.stamp:
        query.append(("sinceTime", position.stamp))
    elif reader.tail is not None:
        query.append(("tailLines", reader.tail))
    return cluster.pod_log(pod.name, query, (CONNECT_SECONDS, _SILENCE_SECONDS))


def _split(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", errors="replace")


def new_lines(stamped: Iterator[str], position: Position, say: Callable[[str], None]) -> Iterator[str]:
    """Lines after ``position``, without their times; several lines may share one time.

    A line without a time is the kubelet's own and no output: it is said, and not repeated.
    """
    known, skipped = (position.stamp, position.at_stamp), 0
    for line in stamped:
        stamp, _, text = line.partition(" ")
        if not _STAMP.fullmatch(stamp):
            if line.strip() and line != position.complaint:
                position.complaint = line
                say(f"the kubelet says: {line}")
            continue
        if stamp < known[0]:
            continue
        if stamp == known[0] and skipped < known[1]:
            skipped += 1
            continue
        position.at_stamp = position.at_stamp + 1 if stamp == position.stamp else 1
        position.stamp = stamp
        yield text


def _rank_lines(cluster: Cluster, pod: TrainerPod, rank: int, position: Position, reader: Reader) -> Iterator[str]:
    """New lines of a rank's own log files in a running pod."""
    mode = "follow" if reader.follow else "once"
    program = _PROGRAM.read_text(encoding="utf-8")
    arguments = [LOG_DIRECTORY, str(rank), str(position.bytes), mode]
    socket = open_exec(cluster, pod.name, CONTAINER, ["python", "-u", "-c", program, *arguments])
    position.answer()
    rest, heard_at = b"", time.monotonic()
    try:
        while socket.is_open() and time.monotonic() - heard_at < _SILENCE_SECONDS:
            socket.update(timeout=_POLL_SECONDS)
            chunk = socket.read_stdout(timeout=0)
            heard_at = time.monotonic() if chunk else heard_at
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                position.bytes += len(line) + 1
                yield line.decode("utf-8", errors="replace")
        if rest and not reader.follow:
            yield rest.decode("utf-8", errors="replace")
    finally:
        socket.close()
