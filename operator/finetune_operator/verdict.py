"""What a look at a job leads to: a status, a story (Events), and a few things to do. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.status import FineTuneJobStatus


class EventType(StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


@dataclass(frozen=True)
class Event:
    """One line of the story that ``kubectl describe`` tells."""

    reason: str  # CamelCase
    message: str
    type: EventType = EventType.NORMAL


@dataclass(frozen=True)
class DeletePod:
    """Remove one pod so that the Job replaces it. ``force``: its node is gone and will not confirm."""

    name: str
    uid: str
    force: bool = False


@dataclass(frozen=True)
class StopJob:
    """Suspend the Job for good: the FineTuneJob has ended and pods may still run."""


@dataclass(frozen=True)
class DeleteResource:
    """Remove the FineTuneJob itself: its time to live is over."""


Command = DeletePod | StopJob | DeleteResource


@dataclass(frozen=True)
class Verdict:
    """The outcome of one reconcile."""

    status: FineTuneJobStatus
    events: tuple[Event, ...] = ()
    commands: tuple[Command, ...] = ()
    look_again_seconds: float | None = None  # None: only when something happens
