"""Which rank is guilty, and of what: the first by cause, then by time.

A rank that was killed is guilty, not the peers whose collectives broke afterwards; those report
``CommunicationFailed``, which loses against every other cause.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.exits import Cause, ExitClass
from finetune_api.fields import SchemaModel
from finetune_api.report import Phase, RankEnd
from finetune_trainer.ranks import RankProcess

_LAST_BYTES = 32 * 1024
_LAST_LINES = 20
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Failure(SchemaModel):
    """How one rank failed; travels between the launchers of a job through the rendezvous store."""

    rank: int
    node_rank: int
    exit_class: ExitClass
    message: str
    hint: str = ""
    exception: str = ""
    phase: Phase | None = None
    step: int | None = None
    ended_at: float  # unix seconds
    last_lines: tuple[str, ...] = ()

    @property
    def secondary(self) -> bool:
        """Whether a worse thing that happened to another rank may be the cause of this one."""
        return self.exit_class in {ExitClass.COMMUNICATION_FAILED, ExitClass.INTERNAL_ERROR}


@dataclass
class Outcome:
    """How the ranks of this node ended."""

    exit_class: ExitClass
    guilty: Failure | None = None
    ends: dict[int, RankEnd] = field(default_factory=dict)
    killed: tuple[int, ...] = ()  # ranks that did not stop within the grace period


def guilty(failures: Iterable[Failure]) -> Failure:
    """The failure that caused the others."""
    return min(failures, key=lambda failure: (_blame(failure), failure.ended_at, failure.rank))


def _blame(failure: Failure) -> int:
    if failure.exit_class == ExitClass.COMMUNICATION_FAILED:
        return 3
    if failure.exit_class == ExitClass.INTERNAL_ERROR:  # may be a broken collective that nobody recognised
        return 2
    return 1 if failure.exit_class.cause == Cause.INTERRUPTION else 0


def classify(process: RankProcess, end: RankEnd | None, node_rank: int, out_of_memory_kills: int) -> Failure:
    """Judge one ended rank by its end file, else by its exit code.

    ``out_of_memory_kills``: how many processes of this container the kernel killed for memory since the ranks started.
    """
    exit_class, message, hint = _verdict(process, end, out_of_memory_kills)
    return Failure(
        rank=process.rank,
        node_rank=node_rank,
        exit_class=exit_class,
        message=message,
        hint=hint,
        exception=end.exception if end else "",
        phase=end.phase if end else None,
        step=end.step if end else None,
        ended_at=process.ended_at or 0.0,
        last_lines=last_lines(process.log),
    )


def _verdict(process: RankProcess, end: RankEnd | None, out_of_memory_kills: int) -> tuple[ExitClass, str, str]:
    if end is not None and end.exit_class != ExitClass.COMPLETED:
        return end.exit_class, end.message, end.hint
    code = process.exit_code or 0
    if code == -signal.SIGKILL and out_of_memory_kills > 0:
        return (
            ExitClass.OUT_OF_MEMORY,
            f"rank {process.rank} was killed by the kernel because the container ran out of host memory",
            "raise resources.limits.memory, or lower training.microBatchSize or dataset.maxSequenceLength",
        )
    if code < 0:
        return (
            ExitClass.RANK_KILLED,
            f"rank {process.rank} was killed by {signal_name(-code)}",
            f"its last lines are in {process.log.name}; the job resumes from the newest whole checkpoint",
        )
    said = " although it had reported success" if end is not None else " without saying why"
    return (
        ExitClass.from_code(code) if code > 1 else ExitClass.INTERNAL_ERROR,
        f"rank {process.rank} exited with code {code}{said}",
        f"see its last lines in {process.log.name}",
    )


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; unknown numbers as they are."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def last_lines(path: Path, count: int = _LAST_LINES) -> tuple[str, ...]:
    """The last non-empty lines of a log, without colours; of a line drawn over and over only its last state."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _LAST_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ()
    drawn = (line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n"))
    lines = [_ESCAPES.sub("", line) for line in drawn]
    return tuple(line for line in lines if line.strip())[-count:]
