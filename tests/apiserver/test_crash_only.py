"""The operator is killed after its k-th write, for every k of a job's life: nobody can tell from what is left."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
from tests.apiserver.life import LIVES
from tests.apiserver.plays import ENDS, KILLS, TROUBLES, Play, Played, perform
from tests.apiserver.server import RunningServer
from tests.apiserver.stage import Outcome, told_once
from tests.training.sharing import shared_folder

pytestmark = pytest.mark.timeout(1800)  # whoever comes first waits for all lives

_MOST_REASONS_TO_WAIT = 6


@pytest.fixture(scope="module")
def played(
    job_server: RunningServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Played:
    """All plays of the lives that were asked for, once per test session."""
    names = [name for name in LIVES if any(f"[{name}" in item.nodeid for item in request.session.items)]

    def fill(folder: Path) -> None:
        (folder / "played").write_bytes(pickle.dumps(perform(job_server, folder, names)))

    outcomes: Played = pickle.loads((shared_folder(tmp_path_factory, "lives", fill) / "played").read_bytes())
    return outcomes


def _outcomes(played: Played, play: Play) -> list[Outcome]:
    outcomes = played[play]
    assert not isinstance(outcomes, str), outcomes
    return outcomes


def _undisturbed(played: Played, name: str) -> Outcome:
    """The life that all others are compared with."""
    return _outcomes(played, Play(name))[0]


@pytest.mark.parametrize("name", LIVES)
def test_an_undisturbed_life_makes_one_of_each_child_and_few_writes(played: Played, name: str) -> None:
    outcome = _undisturbed(played, name)
    made = 2 if name == "suspended" else 1  # it changes meanwhile, and its Job is made anew
    assert outcome.created == {"jobs": made, "services": 1, "configmaps": made}
    assert outcome.history.children == [
        "Job ftj-life of FineTuneJob",
        "Service ftj-life of FineTuneJob",
        *made * ["ConfigMap ftj-life-<digest> of FineTuneJob"],
    ]
    assert (outcome.history.finalizers, outcome.starts, told_once(outcome.log)) == ([], 1, [])
    print(f"{name}: {len(outcome.writes)} writes, {sum(outcome.events.values())} events, {outcome.seconds:.1f} s")


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("name", LIVES)
def test_the_operator_may_die_after_any_write(played: Played, name: str, when: str) -> None:
    expected = _undisturbed(played, name)
    numbers = range(1, len(expected.writes) + 1)
    plays = [Play(name, when, write) for write in (*numbers, *ENDS)]
    assert {play.write: faults for play in plays if (faults := _faults(played[play], expected))} == {}
    outcomes = {play.write: _outcomes(played, play) for play in plays}
    survived = {number: len(outcomes[number][0].writes) for number in numbers if outcomes[number][0].killed is None}
    assert all(number > writes for number, writes in survived.items()), survived
    killed = {write: several[-1].killed for write, several in outcomes.items()}
    assert [write for write, seen in killed.items() if seen is None] == []
    made = {seen.resource for seen in killed.values() if seen and (seen.method, seen.code) == ("POST", 201)}
    assert made == {"configmaps", "services", "jobs", "events"}
    lives = [outcome for several in outcomes.values() for outcome in several]
    seconds = max(outcome.seconds for outcome in lives)
    print(f"{name}, {when}: killed at {len(killed)} writes in {len(lives)} lives of {seconds:.0f} s at most")


@pytest.mark.parametrize("name", LIVES)
def test_the_api_server_may_fail_in_every_way(played: Played, name: str) -> None:
    expected = _undisturbed(played, name)
    plays = {trouble: played[Play(name, trouble)] for trouble in TROUBLES}
    assert {trouble: faults for trouble, play in plays.items() if (faults := _faults(play, expected))} == {}
    outcomes = {trouble: _outcomes(played, Play(name, trouble))[0] for trouble in TROUBLES}
    assert {trouble: outcome.starts for trouble, outcome in outcomes.items() if outcome.starts > 1} == {}
    assert outcomes["answers that never come"].log.count("did not answer (TimeoutError") >= 2
    print(f"{name}:", *(f"{trouble} {o.seconds:.0f} s {o.faults}" for trouble, o in outcomes.items()), sep="\n    ")
    assert {trouble: o.faults for trouble, o in outcomes.items() if not all(struck for _, struck in o.faults)} == {}


def _faults(play: list[Outcome] | str, expected: Outcome) -> list[str]:
    """What a disturbed life left otherwise than the undisturbed one, or why it went no further."""
    if isinstance(play, str):
        return [play]
    return [fault for outcome in play for fault in _differs(outcome, expected)]


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
