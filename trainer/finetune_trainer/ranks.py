"""The rank processes of one node and one attempt: start, watch, stop, reap."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_FOLLOW_SECONDS = 0.2


@dataclass
class RankProcess:
    """One rank. ``exit_code`` is negative for a signal, as in :mod:`subprocess`; times are unix seconds."""

    rank: int
    local_rank: int
    process: subprocess.Popen[bytes]
    log: Path
    exit_code: int | None = None
    ended_at: float | None = None
    killed_by_us: bool = False

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs."""
        if self.exit_code is None:
            self.exit_code = self.process.poll()
            if self.exit_code is not None:
                self.ended_at = time.time()
        return self.exit_code


class RankGroup:
    """All ranks of this node. Every rank leads its own session, so that a kill takes its helpers along."""

    def __init__(self, command: Sequence[str], log_directory: Path) -> None:
        self._command = tuple(command)
        self._log_directory = log_directory
        self._follower: LogFollower | None = None
        self.ranks: list[RankProcess] = []

    def start(self, rank: int, local_rank: int, environment: dict[str, str]) -> RankProcess:
        """Start one rank; its output goes to ``rank-<n>.log``, and for rank 0 also to our standard output."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        path = self._log_directory / f"rank-{rank}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                self._command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = RankProcess(rank, local_rank, process, path)
        self.ranks.append(started)
        if rank == 0:
            self._follower = LogFollower(path)
        return started

    def poll(self) -> None:
        """Look at every rank once, and collect orphans that were handed to us (duty of process 1)."""
        for rank in self.ranks:
            rank.poll()
        reap_orphans({rank.process.pid for rank in self.ranks})

    @property
    def running(self) -> list[RankProcess]:
        return [rank for rank in self.ranks if rank.poll() is None]

    def stop(self, grace_seconds: float, hurry: Callable[[], bool], tick: Callable[[], None]) -> None:
        """SIGTERM to every running rank, wait up to ``grace_seconds`` (or until ``hurry()``), then SIGKILL."""
        for rank in self.running:
            _send(rank.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self.running and time.monotonic() < deadline and not hurry():
            self.poll()
            tick()
            time.sleep(0.05)
        for rank in self.running:
            rank.killed_by_us = True
        for rank in self.ranks:
            _send_group(rank.process.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
            rank.poll()
        reap_orphans(set())

    def close(self) -> None:
        """Pass on the last lines of rank 0."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None


class LogFollower:
    """Copies a growing file to our standard output. A slow reader of ours never holds the rank up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"follow-{path.name}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        with self._path.open("rb") as file:
            while not self._done.wait(_FOLLOW_SECONDS):
                _copy(file)
            _copy(file)

    def close(self) -> None:
        self._done.set()
        self._thread.join(timeout=10)


def _copy(file: BinaryIO) -> None:
    while chunk := file.read(1 << 16):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _send_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody left, or only zombies
        os.killpg(leader, number)


def reap_orphans(ours: set[int]) -> int:
    """Collect exited children that are not ours to poll: orphans of ranks fall to process 1. Returns how many."""
    reaped = 0
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return reaped
        if found is None or found.si_pid in ours:
            return reaped
        try:
            os.waitpid(found.si_pid, os.WNOHANG)
        except ChildProcessError:
            return reaped
        reaped += 1
