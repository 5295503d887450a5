"""Which jobs want to be looked at, and when: one entry per job, never two looks at the same job at once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from dataclasses import dataclass

Key = tuple[str, str]  # namespace, name

_BACKOFF_SECONDS = (0.2, 0.5, 1, 2, 4, 8, 15, 30)
_JITTER = 0.3
_HEAD_START_SECONDS = 3600.0


@dataclass
class _Entry:
    due: float  # time.monotonic(); long ago for whom nobody goes before
    asked: float  # when the oldest unprocessed request came in
    ticket: int  # of its newest place in the heap; older places are void


class WorkQueue:
    """Requests for the same job melt into one; the earliest due time wins. Used from one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[Key, _Entry] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._busy: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._tickets = itertools.count()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()  # one waits for news, the others for their turn: an event wakes one, not all

    def add(self, key: Key, delay_seconds: float = 0.0, first: bool = False) -> None:
        """Look at ``key`` after ``delay_seconds`` at the latest. ``first``: now, before all others."""
        now = time.monotonic()
        due = now - _HEAD_START_SECONDS if first else now + delay_seconds
        entry = self._waiting.get(key)
        if entry is not None and entry.due <= due:
            return
        ticket = next(self._tickets)
        self._waiting[key] = _Entry(due, min(entry.asked, now) if entry and entry.due <= now else max(due, now), ticket)
        heapq.heappush(self._heap, (due, ticket, key))
        self._changed.set()

    async def get(self) -> Key:
        """The next job that is due and not being looked at. Call :meth:`done` afterwards."""
        async with self._turn:
            while True:
                key, wait = self._pop()
                if key is not None:
                    return key
                self._changed.clear()
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    def done(self, key: Key) -> None:
        """The look at ``key`` is over; what was asked meanwhile comes next."""
        self._busy.discard(key)
        if key in self._waiting:
            entry = self._waiting[key]
            heapq.heappush(self._heap, (entry.due, entry.ticket, key))
            self._changed.set()

    def failed(self, key: Key, at_least_seconds: float = 0.0) -> float:
        """Look again after a delay that doubles with every failure in a row, and a little chance; the delay."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        delay = max(_BACKOFF_SECONDS[min(count, len(_BACKOFF_SECONDS) - 1)], at_least_seconds)
        delay *= random.uniform(1.0, 1.0 + _JITTER)  # those who failed together do not come back together
        self.add(key, delay)
        return delay

    def succeeded(self, key: Key) -> None:
        """The row of failures is over."""
        self._failures.pop(key, None)

    def forget(self, key: Key) -> None:
        """The job is gone."""
        self._waiting.pop(key, None)
        self._failures.pop(key, None)

    @property
    def depth(self) -> int:
        """Jobs that are due and wait for a worker."""
        now = time.monotonic()
        return sum(entry.due <= now for entry in self._waiting.values())

    @property
    def oldest_seconds(self) -> float:
        """Age of the oldest request that is due."""
        now = time.monotonic()
        return max((now - entry.asked for entry in self._waiting.values() if entry.due <= now), default=0.0)

    def _pop(self) -> tuple[Key | None, float | None]:
        """A due key, or the seconds until one may be."""
        now = time.monotonic()
        while self._heap:
            due, ticket, key = self._heap[0]
            entry = self._waiting.get(key)
            if entry is None or entry.ticket != ticket or key in self._busy:
                heapq.heappop(self._heap)  # void, or pushed again by done()
                continue
            if due > now:
                return None, due - now
            heapq.heappop(self._heap)
            del self._waiting[key]
            self._busy.add(key)
            return key, None
        return None, None
