"""What the launcher knows about itself: one object, written by the main thread, read by the HTTP threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from finetune_api.exits import ExitClass
from finetune_api.plan import Plan
from finetune_api.report import EndedAttempt, Phase, Progress
from finetune_api.trainer_config import JobIdentity
from finetune_trainer.failures import Failure
from finetune_trainer.progress import read_heartbeats

UNHEALTHY_AFTER_SECONDS = 60.0
KEPT_ATTEMPTS = 5
MESSAGE_LENGTH = 200  # of an ended attempt: several travel in a termination message


class LauncherStatus:
    """Phase, attempt and plan of this node. ``progress()`` adds the ranks' latest words."""

    def __init__(self, job: JobIdentity, node_rank: int, work_directory: Path) -> None:
        self.job = job
        self.node_rank = node_rank
        self.work_directory = work_directory
        self.plan: Plan | None = None
        self.attempt = 0
        self.restarts = 0
        self.stopping = False
        self.gang = ""  # of the running attempt
        self.attempt_started_at = 0.0
        self.ended: tuple[EndedAttempt, ...] = ()  # attempts after which the ranks were started again
        self.started_at = time.time()
        self._lock = threading.Lock()
        self._phase: tuple[Phase, str, float | None, float | None] = (Phase.FETCHING_MODEL, "", None, None)
        self._watched_at: float | None = None  # time.monotonic() of the agent's last look at its ranks

    def enter(self, phase: Phase, message: str = "", done: float | None = None, total: float | None = None) -> None:
        """Say what is going on; ``done`` of ``total`` in the unit that ``message`` names."""
        with self._lock:
            self._phase = (phase, message, done, total)

    def watched(self, now: float | None) -> None:
        """The agent looked at its ranks at ``now`` (``time.monotonic()``); ``None``: it is not supposed to look."""
        self._watched_at = now

    def begin_attempt(self, gang: str) -> None:
        """The launchers have met: all ranks start."""
        self.attempt += 1
        self.gang, self.attempt_started_at = gang, time.time()

    def end_attempt(self, end: EndedAttempt) -> None:
        """Remember an attempt after which the ranks are started again."""
        self.ended = (*self.ended, end)[-KEPT_ATTEMPTS:]
        self.gang = ""

    def describe_attempt(self, exit_class: ExitClass, message: str, guilty: Failure | None = None) -> EndedAttempt:
        """The running attempt as one that ended now. To be called before the heartbeats are forgotten."""
        beats = read_heartbeats(self.work_directory).values()
        steps = [beat.step for beat in beats] + ([guilty.step] if guilty and guilty.step is not None else [])
        resumed = [beat.resumed_from_step for beat in beats if beat.resumed_from_step is not None]
        return EndedAttempt(
            gang=self.gang,
            number=self.attempt,
            started_at=self.attempt_started_at,
            ended_at=(guilty.ended_at if guilty else 0.0) or time.time(),
            exit_class=exit_class,
            guilty_rank=guilty.rank if guilty else None,
            guilty_node=guilty.node_rank if guilty else None,
            resumed_from_step=min(resumed, default=None),
            last_step=max(steps, default=None),
            message=message if len(message) <= MESSAGE_LENGTH else message[: MESSAGE_LENGTH - 3] + "...",
        )

    @property
    def healthy(self) -> bool:
        """Whether the agent still watches the ranks it is supposed to watch."""
        watched_at = self._watched_at
        return watched_at is None or time.monotonic() - watched_at < UNHEALTHY_AFTER_SECONDS

    def progress(self) -> Progress:
        """A snapshot of this node."""
        heartbeats = tuple(read_heartbeats(self.work_directory).values())
        with self._lock:
            phase, message, done, total = self._phase
        if heartbeats and phase == Phase.LOADING_MODEL:
            phase = heartbeats[0].phase
        return Progress(
            job=self.job.model_dump(),
            node_rank=self.node_rank,
            pid=os.getpid(),
            phase=phase,
            message=message,
            done=done,
            total=total,
            attempt=self.attempt,
            restarts=self.restarts,
            gang=self.gang,
            attempt_started_at=self.attempt_started_at if self.gang else 0.0,
            ended=self.ended,
            stopping=self.stopping,
            ranks=heartbeats,
            plan=self.plan,
            started_at=self.started_at,
        )
