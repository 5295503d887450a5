"""All lives with all that may disturb them, performed once per test session in one pool; the tests only judge.

Each has a namespace, a proxy and operator processes of its own; many run at a time, because the Job controller's pauses
make most of a life waiting.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.apiserver.proxy import (
    Fault,
    Seen,
    broken,
    dropped,
    gateway_timeout,
    gone,
    hanging,
    internal_error,
    too_many_requests,
)
from tests.apiserver.server import RunningServer
from tests.apiserver.stage import Outcome, Stage, live

from finetune_operator.kube import PAGE, REQUEST_SECONDS

AT_ONCE = int(os.environ.get("FINETUNE_LIVES_AT_ONCE", "10"))
KILLS = ("answered", "done")  # the operator knew; the API server had done it and the answer never came
_MOST_TRIES = 4  # to kill an operator at its last write
_WRITTEN = ("configmaps", "services", "jobs", "finetunejobs/status")


@dataclass(frozen=True)
class Play:
    """One life, and what happens to it: nothing, a trouble, or the end of the operator at a write."""

    name: str
    trouble: str = ""  # or one of KILLS
    write: int | str = 0  # its number, or one of ENDS


# Of each play what came of it (more than once where it had to be repeated), or why it went no further.
Played = dict[Play, list[Outcome] | str]


# ---- kills and troubles ----------------------------------------------------------------------------------------------


def _says_the_end(seen: Seen) -> bool:
    return seen.resource == "finetunejobs/status" and seen.body["status"].get("state") in {"Complete", "Failed"}


def _tells_the_end(seen: Seen) -> bool:
    return seen.resource == "events" and seen.body["reason"] in {"Complete", "Failed"}


ENDS: dict[str, Callable[[Seen], bool]] = {"last status": _says_the_end, "last event": _tells_the_end}


def _writes_of(resource: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.is_write and seen.resource == resource


def _watches_of(resource: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.is_watch and seen.resource == resource


def _lists_pods(seen: Seen) -> bool:
    return seen.method == "GET" and not seen.is_watch and seen.resource == "pods"


def _lists_jobs_by_kopf(seen: Seen) -> bool:
    return seen.method == "GET" and not seen.is_watch and seen.resource == "jobs" and f"limit={PAGE}" in seen.query


def _nth(seen: Seen, period: int) -> bool:
    """Every ``period``-th request, by its time of arrival: no two runs break at the same places."""
    return int(seen.at * 1000) % period == 0


def _every_second(strikes: Callable[[Seen], bool]) -> Callable[[Seen], bool]:
    """Not the first one, the second one, not the third one, ..."""
    turn = itertools.cycle((False, True))
    return lambda seen: strikes(seen) and next(turn)


TROUBLES: dict[str, Callable[[], list[Fault]]] = {
    "answers that never come": lambda: [
        hanging(_lists_jobs_by_kopf, seconds=REQUEST_SECONDS + 5),
        hanging(_lists_pods, seconds=REQUEST_SECONDS + 5),
        hanging(_writes_of("finetunejobs/status"), seconds=REQUEST_SECONDS + 5, after=True),
    ],
    "429 with Retry-After to every kind of write": lambda: [
        too_many_requests(_writes_of(resource), times=2) for resource in _WRITTEN
    ],
    "500 to every kind of write": lambda: [internal_error(_writes_of(resource), times=2) for resource in _WRITTEN],
    "504 after the deed": lambda: [gateway_timeout(_writes_of(resource), after=True, times=2) for resource in _WRITTEN],
    "connections that break before": lambda: [dropped(lambda seen: not seen.is_watch and _nth(seen, 3), times=20)],
    "connections that break after the deed": lambda: [
        dropped(_writes_of(resource), after=True, times=4)  # one look gives up after three
        for resource in _WRITTEN
    ],
    "lists that fail": lambda: [internal_error(_lists_pods, times=5)],
    "watches that are too old": lambda: [gone(lambda seen: seen.is_watch, times=4)],
    # Both watches live for a second and a half; every second time they are opened again a second is missed for good.
    "watches that break again and again and miss what happens": lambda: [
        *(gone(_every_second(_watches_of(kind)), seconds=1.0, times=1000) for kind in ("finetunejobs", "jobs")),
        *(broken(_watches_of(kind), seconds=1.5, times=1000) for kind in ("finetunejobs", "jobs")),
    ],
}


# ---- the performance -------------------------------------------------------------------------------------------------


def perform(server: RunningServer, folder: Path, names: Sequence[str]) -> Played:
    """Everything that these lives may meet, the longest first."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        plays: dict[Play, Future[list[Outcome]]] = {}

        def add(play: Play) -> None:
            plays[play] = pool.submit(_perform, server, folder, play)

        for name in names:
            add(Play(name))
        for trouble in TROUBLES:
            for name in names:
                add(Play(name, trouble))
        for name in names:
            if plays[Play(name)].exception() is None:
                writes = len(plays[Play(name)].result()[0].writes)
                for when, write in itertools.product(KILLS, (*ENDS, *range(1, writes + 1))):
                    add(Play(name, when, write))
        return {play: _result(done) for play, done in plays.items()}


def _result(done: Future[list[Outcome]]) -> list[Outcome] | str:
    error = done.exception()
    return done.result() if error is None else f"{type(error).__name__}: {error}"


def _perform(server: RunningServer, folder: Path, play: Play) -> list[Outcome]:
    folder = folder / f"{play.name} {play.trouble} {play.write}".replace(" ", "-")
    if play.trouble not in KILLS:
        return [live(server, folder, play.name, lambda there: _trouble(there, play.trouble))]
    outcomes: list[Outcome] = []
    # No two lives have equally many writes: a look may see two things at once, or an Event about waiting is not due.
    # Where the operator survived because it wrote less, it is to die at its last write.
    while not outcomes or (outcomes[-1].killed is None and len(outcomes) < _MOST_TRIES):
        write = len(outcomes[-1].writes) if outcomes else play.write

        def kill(there: Stage, write: int | str = write) -> None:
            if isinstance(write, str):
                there.proxy.kill_at(ENDS[write], there.operator.kill, when=play.trouble)
            else:
                there.proxy.kill_at_write(write, there.operator.kill, when=play.trouble)

        outcomes.append(live(server, folder / f"{len(outcomes)}", play.name, kill))
    return outcomes


def _trouble(there: Stage, trouble: str) -> None:
    for fault in TROUBLES[trouble]() if trouble else []:
        there.proxy.inject(fault)
