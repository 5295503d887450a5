"""How ranks talk to their launcher: small files under ``<work>/ranks/``, each replaced atomically.

A rank owns ``<rank>.json`` (its :class:`~finetune_api.report.Heartbeat`) and ``<rank>.end.json`` (its
:class:`~finetune_api.report.RankEnd`). The launcher empties the directory before every attempt, after the ranks of the
attempt before are dead, so a file found there always belongs to the running attempt.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from finetune_api.report import STEP_SECONDS_BUCKETS, Heartbeat, Phase, RankEnd

RANKS = "ranks"
_PR_SET_PDEATHSIG = 1


def write_atomically(path: Path, model: BaseModel) -> None:
    """Replace ``path`` by the model's JSON: a reader sees the old text or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(model.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    temporary.replace(path)


class HeartbeatWriter:
    """One rank's voice. ``update`` may be called at every step: it writes at most ``writes_per_second`` times a second.

    A change of phase is written at once. Numbers that are not finite are left out (the loop's guard names them).
    ``step_seconds`` of every new step is counted into the histogram here, so throttled writes lose no step.
    """

    def __init__(self, work_directory: Path, rank: int, local_rank: int, writes_per_second: float = 10.0) -> None:
        self._directory = Path(work_directory) / RANKS
        self._interval_seconds = 1.0 / writes_per_second
        self._written_at = -math.inf
        self._counts = [0] * (len(STEP_SECONDS_BUCKETS) + 1)
        self._latest = Heartbeat(
            rank=rank, local_rank=local_rank, pid=os.getpid(), phase=Phase.LOADING_MODEL, updated_at=time.time()
        )
        self.flush()

    @property
    def latest(self) -> Heartbeat:
        """What was said last, written or not yet."""
        return self._latest

    def update(self, **fields: Any) -> None:
        """Merge ``fields`` of :class:`Heartbeat` into the last word and write it when it is time."""
        before = self._latest
        fields = {name: None if _not_finite(value) else value for name, value in fields.items()}
        if fields.get("step", 0) > before.step and fields.get("step_seconds") is not None:
            fields |= self._count_step(fields["step_seconds"])
        known = {name: getattr(before, name) for name in Heartbeat.model_fields}
        self._latest = Heartbeat.model_validate({**known, **fields, "updated_at": time.time()})
        if self._latest.phase != before.phase or time.monotonic() - self._written_at >= self._interval_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the last word now."""
        write_atomically(self._directory / f"{self._latest.rank}.json", self._latest)
        self._written_at = time.monotonic()

    def end(self, end: RankEnd) -> None:
        """Write the last heartbeat and how this rank ended."""
        self.flush()
        write_atomically(self._directory / f"{end.rank}.end.json", end)

    def _count_step(self, seconds: float) -> dict[str, Any]:
        self._counts[bisect.bisect_left(STEP_SECONDS_BUCKETS, seconds)] += 1
        return {
            "step_seconds_counts": tuple(self._counts),
            "step_seconds_sum": self._latest.step_seconds_sum + seconds,
        }


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_heartbeats(work_directory: Path) -> dict[int, Heartbeat]:
    """The latest word of every local rank that has spoken in the running attempt."""
    found = (Heartbeat.model_validate_json(text) for text in _read(work_directory, ended=False))
    return {heartbeat.rank: heartbeat for heartbeat in sorted(found, key=lambda heartbeat: heartbeat.rank)}


def read_ends(work_directory: Path) -> dict[int, RankEnd]:
    """How every local rank of the running attempt ended that could still say so."""
    found = (RankEnd.model_validate_json(text) for text in _read(work_directory, ended=True))
    return {end.rank: end for end in sorted(found, key=lambda end: end.rank)}


def clear(work_directory: Path) -> None:
    """Forget an earlier attempt. Call only when its ranks are dead."""
    for path in (Path(work_directory) / RANKS).glob("*"):
        path.unlink(missing_ok=True)
    for path in (Path(work_directory) / RANKS).glob(".*.json*"):
        path.unlink(missing_ok=True)


def _read(work_directory: Path, ended: bool) -> list[str]:
    texts = []
    for path in (Path(work_directory) / RANKS).glob("[0-9]*.json"):
        if path.name.endswith(".end.json") != ended:
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue  # cleared between listing and reading
    return texts


class StopSignal:
    """Notes SIGTERM in a rank, so that the loop can write a checkpoint at the next step boundary.

    Also asks the kernel to kill this rank when its launcher dies: without a launcher nobody would collect it, and in
    a pod the launcher is process 1. Must be made in the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.requested_at: float | None = None  # time.monotonic()
        signal.signal(signal.SIGTERM, self._note)
        _die_with_parent()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self.requested_at is None:
            self.requested_at = time.monotonic()


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died between the two calls
        os.kill(os.getpid(), signal.SIGKILL)
