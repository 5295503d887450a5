"""The operator is killed after its k-th write, for every k of a job's life: nobody can tell from what is left.

Each k has a namespace, a proxy and operator processes of its own; several run at a time, because the Job controller's
pauses make most of a life waiting.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.apiserver.life import LIVES
from tests.apiserver.proxy import (
    Fault,
    Seen,
    dropped,
    gateway_timeout,
    gone,
    internal_error,
    too_many_requests,
)
from tests.apiserver.server import RunningServer
from tests.apiserver.stage import Outcome, Stage, live, told_once

AT_ONCE = int(os.environ.get("FINETUNE_LIVES_AT_ONCE", "5"))
_MOST_REASONS_TO_WAIT = 6

_undisturbed: dict[str, Outcome] = {}


def undisturbed(server: RunningServer, folder: Path, name: str) -> Outcome:
    """The life that all others are compared with; once per worker."""
    if name not in _undisturbed:
        _undisturbed[name] = live(server, folder / f"{name}-undisturbed", name)
    return _undisturbed[name]


@pytest.mark.parametrize("name", LIVES)
def test_an_undisturbed_life_makes_one_of_each_child_and_few_writes(
    job_server: RunningServer, tmp_path: Path, name: str
) -> None:
    outcome = undisturbed(job_server, tmp_path, name)
    assert outcome.created == {"jobs": 1, "services": 1, "configmaps": 1}
    assert outcome.history.children == [
        "Job ftj-life of FineTuneJob",
        "Service ftj-life of FineTuneJob",
        "ConfigMap ftj-life-<digest> of FineTuneJob",
    ]
    assert (outcome.history.finalizers, outcome.starts, told_once(outcome.log)) == ([], 1, [])
    print(f"{name}: {len(outcome.writes)} writes, {sum(outcome.events.values())} events, {outcome.seconds:.1f} s")


@pytest.mark.parametrize("when", ["answered", "done"])
@pytest.mark.parametrize("name", LIVES)
def test_the_operator_may_die_after_any_write(job_server: RunningServer, tmp_path: Path, name: str, when: str) -> None:
    """``answered``: it knew; ``done``: the API server had done it and the answer never came."""
    expected = undisturbed(job_server, tmp_path, name)
    numbers = range(1, len(expected.writes) + 1)

    def killed(number: int) -> tuple[int, Outcome]:
        def disturb(there: Stage) -> None:
            there.proxy.kill_at_write(number, there.operator.kill, when=when)

        return number, live(job_server, tmp_path / f"{name}-{when}-{number}", name, disturb)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = dict(pool.map(killed, numbers))
    faults = {number: trouble for number, outcome in outcomes.items() if (trouble := _differs(outcome, expected))}
    print(f"{name}, {when}: {len(outcomes)} lives, faults {faults}")
    assert faults == {}
    # Where one look saw two things at once, or an Event about waiting was not due, a life has fewer writes.
    survived = {number: len(outcome.writes) for number, outcome in outcomes.items() if outcome.starts == 1}
    assert all(number > writes for number, writes in survived.items()), survived
    assert len(survived) <= len(numbers) // 4, survived
    seconds = max(outcome.seconds for outcome in outcomes.values())
    print(f"{name}, {when}: killed at each of {len(outcomes) - len(survived)} writes, {seconds:.0f} s at most")


def _writes_of(resource: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.is_write and seen.resource == resource


_TROUBLE: dict[str, Callable[[], list[Fault]]] = {
    "429 with Retry-After to every kind of write": lambda: [
        too_many_requests(_writes_of(resource), times=2)
        for resource in ("configmaps", "services", "jobs", "finetunejobs/status")
    ],
    "500 to every kind of write": lambda: [
        internal_error(_writes_of(resource), times=2)
        for resource in ("configmaps", "services", "jobs", "finetunejobs/status")
    ],
    "504 after the deed": lambda: [
        gateway_timeout(_writes_of(resource), after=True, times=2)
        for resource in ("configmaps", "services", "jobs", "finetunejobs/status")
    ],
    "connections that break before": lambda: [dropped(lambda seen: not seen.is_watch and _nth(seen, 3), times=20)],
    "connections that break after the deed": lambda: [
        dropped(_writes_of(resource), after=True, times=4)  # one look gives up after three
        for resource in ("configmaps", "services", "jobs", "finetunejobs/status")
    ],
    "lists that fail": lambda: [
        internal_error(lambda seen: seen.method == "GET" and not seen.is_watch and seen.resource == "pods", times=5)
    ],
    "watches that are too old": lambda: [gone(lambda seen: seen.is_watch, times=4)],
}


def _nth(seen: Seen, period: int) -> bool:
    """Every ``period``-th request, by its time of arrival: no two runs break at the same places."""
    return int(seen.at * 1000) % period == 0


@pytest.mark.parametrize("name", LIVES)
def test_the_api_server_may_fail_in_every_way(job_server: RunningServer, tmp_path: Path, name: str) -> None:
    expected = undisturbed(job_server, tmp_path, name)

    def troubled(item: tuple[int, str]) -> tuple[str, Outcome, int]:
        number, trouble = item
        faults = _TROUBLE[trouble]()
        budget = sum(fault.times for fault in faults)

        def disturb(there: Stage) -> None:
            for fault in faults:
                there.proxy.inject(fault)

        outcome = live(job_server, tmp_path / f"{name}-trouble-{number}", name, disturb)
        return trouble, outcome, budget - sum(fault.times for fault in faults)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(troubled, enumerate(_TROUBLE)))
    assert {trouble: fault for trouble, o, _ in outcomes if (fault := _differs(o, expected))} == {}
    assert {trouble: outcome.starts for trouble, outcome, _ in outcomes if outcome.starts > 1} == {}
    assert [trouble for trouble, _, struck in outcomes if not struck] == []


def _differs(outcome: Outcome, expected: Outcome) -> list[str]:
    """What a disturbed life left otherwise than the undisturbed one."""
    faults = []
    if outcome.history != expected.history:
        faults += _difference("status", outcome.history.status, expected.history.status)
        if (outcome.history.children, outcome.history.finalizers) != (
            expected.history.children,
            expected.history.finalizers,
        ):
            faults.append(f"children {outcome.history.children}, finalizers {outcome.history.finalizers}")
    if outcome.created != expected.created:
        faults.append(f"created {dict(outcome.created)}")
    # What a job waits for depends on the moment of the look; that it is no flood is all that is asked.
    again = {reason: more for reason, more in (outcome.events - expected.events).items() if reason != "Waiting"}
    if again or outcome.events["Waiting"] > _MOST_REASONS_TO_WAIT:
        faults.append(f"told again: {again}, waiting {outcome.events['Waiting']} times")
    lost = Counter({reason: count for reason, count in expected.events.items() if reason != "Waiting"}) - outcome.events
    if sum(lost.values()) > 1:  # one may be lost with the process that was about to tell it
        faults.append(f"never told: {dict(lost)}")
    return faults + told_once(outcome.log)


def _difference(path: str, left: object, right: object) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        return [
            line
            for key in sorted({*left, *right})
            for line in _difference(f"{path}.{key}", left.get(key), right.get(key))
        ]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [
            line
            for at, pair in enumerate(zip(left, right, strict=True))
            for line in _difference(f"{path}[{at}]", *pair)
        ]
    return [] if left == right else [f"{path} is {left!r}, not {right!r}"]
