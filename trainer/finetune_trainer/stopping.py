"""SIGTERM and SIGINT of a launcher."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Raised in the main thread when a signal arrives while nothing has to be wound down carefully."""


class StopRequest:
    """Notes the first SIGTERM or SIGINT; a SIGINT after it asks to hurry (kill the ranks now).

    While the ranks run, the agent polls ``requested``. Inside ``interruptible()`` (downloads, data preparation,
    rendezvous) the signal raises :class:`Stopped` instead.
    """

    def __init__(self) -> None:
        self.requested = False
        self.hurry = False
        self._interruptible = False

    def install(self) -> None:
        """Take over both signals. Main thread only."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.hurry = self.hurry or (self.requested and number == signal.SIGINT)
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise Stopped

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise :class:`Stopped` inside this block; a signal that came earlier raises at once."""
        if self.requested:
            raise Stopped
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
