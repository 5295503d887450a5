"""Learning rate schedules: values per schedule (by hand, from docs/schedules.md) and properties of all of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.spec import Schedule, ScheduleType
from finetune_trainer.schedules import learning_rate_factor

ROOT_HALF = math.sqrt(0.5)

# (schedule fields, total steps, warm-up steps, {step: factor})
TABLE: list[tuple[dict[str, Any], int, int, dict[int, float]]] = [
    ({"type": "Constant"}, 10, 4, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0}),
    ({"type": "Constant"}, 10, 0, {0: 1.0, 9: 1.0}),
    ({"type": "Linear"}, 10, 2, {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.5, 9: 0.125, 10: 0.0}),
    ({"type": "Linear", "minimum_fraction": 0.2}, 8, 0, {0: 1.0, 4: 0.6, 8: 0.2}),
    ({"type": "Cosine"}, 8, 0, {0: 1.0, 2: 0.5 + ROOT_HALF / 2, 4: 0.5, 6: 0.5 - ROOT_HALF / 2, 8: 0.0}),
    ({"type": "Cosine", "cycles": 2}, 8, 0, {0: 1.0, 2: 0.5, 4: 1.0, 6: 0.5, 8: 0.0}),
    ({"type": "Cosine", "minimum_fraction": 0.1}, 12, 2, {0: 0.5, 1: 1.0, 2: 1.0, 7: 0.55, 12: 0.1}),
    ({"type": "Polynomial", "power": 2.0}, 10, 0, {0: 1.0, 5: 0.25, 9: 0.01, 10: 0.0}),
    ({"type": "Polynomial"}, 10, 2, {0: 0.5, 2: 1.0, 6: 0.5, 9: 0.125}),
    ({"type": "InverseSquareRoot"}, 64, 4, {0: 0.25, 3: 1.0, 15: 0.5, 63: 0.25}),
    ({"type": "InverseSquareRoot", "minimum_fraction": 0.4}, 64, 4, {15: 0.5, 63: 0.4}),
    ({"type": "InverseSquareRoot"}, 16, 0, {0: 1.0, 3: 0.5, 15: 0.25}),
    ({"type": "WarmupStableDecay"}, 20, 4, {0: 0.25, 3: 1.0, 15: 1.0, 16: 1.0, 17: 0.75, 18: 0.5, 19: 0.25, 20: 0.0}),
    ({"type": "WarmupStableDecay", "decay_fraction": 0.5, "minimum_fraction": 0.5}, 8, 0, {3: 1.0, 6: 0.75, 8: 0.5}),
    ({"type": "WarmupStableDecay", "decay_fraction": 0.0}, 8, 0, {0: 1.0, 7: 1.0}),
    (
        {"type": "OneCycle", "peak_fraction": 0.4, "initial_ratio": 4.0},
        10,
        0,
        {0: 0.25, 2: 0.625, 4: 1.0, 7: 0.5, 10: 0.0},
    ),
    (
        {"type": "OneCycle", "peak_fraction": 0.5, "initial_ratio": 4.0, "minimum_fraction": 0.5},
        8,
        3,
        {0: 0.25, 2: 0.625, 4: 1.0, 6: 0.75, 8: 0.5},
    ),
    # Howard & Ruder's defaults: cut_frac 0.1, ratio 32
    ({"type": "SlantedTriangular"}, 100, 0, {0: 1 / 32, 5: 33 / 64, 10: 1.0, 55: 33 / 64, 100: 1 / 32}),
    ({"type": "SlantedTriangular", "minimum_fraction": 0.25}, 100, 9, {0: 0.25, 10: 1.0, 100: 0.25}),
]

schedules = st.builds(
    Schedule,
    type=st.sampled_from(ScheduleType),
    minimum_fraction=st.floats(0.0, 1.0),
    cycles=st.integers(1, 5),
    power=st.floats(0.1, 5.0),
    decay_fraction=st.floats(0.0, 1.0),
    peak_fraction=st.floats(0.0, 1.0),
    initial_ratio=st.floats(1.0, 1000.0),
)


@pytest.mark.parametrize(("fields", "total", "warmup", "expected"), TABLE)
def test_a_schedule_has_the_values_of_its_formula(
    fields: dict[str, Any], total: int, warmup: int, expected: dict[int, float]
) -> None:
    schedule = Schedule(**fields)
    actual = {step: learning_rate_factor(schedule, step, total, warmup) for step in expected}
    assert actual == pytest.approx(expected, abs=1e-12)


def test_the_table_covers_every_schedule() -> None:
    assert {ScheduleType(fields["type"]) for fields, *_ in TABLE} == set(ScheduleType)


@given(schedule=schedules, total=st.integers(1, 500), warmup=st.integers(0, 100))
def test_every_step_has_a_positive_factor_of_at_most_one(schedule: Schedule, total: int, warmup: int) -> None:
    factors = [learning_rate_factor(schedule, step, total, warmup) for step in range(total)]
    assert all(0.0 < factor <= 1.0 + 1e-12 for factor in factors)


@given(schedule=schedules, total=st.integers(2, 500), warmup=st.integers(0, 100))
def test_no_schedule_goes_below_its_floor_after_the_warmup(schedule: Schedule, total: int, warmup: int) -> None:
    start = math.floor(total * schedule.peak_fraction) if schedule.type == ScheduleType.ONE_CYCLE else warmup
    factors = [learning_rate_factor(schedule, step, total, warmup) for step in range(start, total + 1)]
    assert all(factor >= schedule.minimum_fraction - 1e-12 for factor in factors)


@given(
    kind=st.sampled_from(["Linear", "Cosine", "Polynomial", "WarmupStableDecay"]),
    floor=st.floats(0.0, 1.0),
    total=st.integers(1, 500),
    data=st.data(),
)
def test_a_schedule_arrives_at_its_floor_when_the_last_step_is_done(
    kind: str, floor: float, total: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    schedule = Schedule(type=ScheduleType(kind), minimum_fraction=floor)
    assert learning_rate_factor(schedule, total, total, warmup) == pytest.approx(floor, abs=1e-12)


@given(schedule=schedules.filter(lambda s: s.cycles == 1), total=st.integers(1, 300), warmup=st.integers(0, 300))
def test_a_schedule_rises_once_and_then_falls(schedule: Schedule, total: int, warmup: int) -> None:
    factors = [learning_rate_factor(schedule, step, total, warmup) for step in range(total)]
    peak = factors.index(max(factors))
    rising = all(a <= b + 1e-12 for a, b in pairwise(factors[: peak + 1]))
    falling = all(a >= b - 1e-12 for a, b in pairwise(factors[peak:]))
    assert rising
    assert falling


def test_a_warmup_longer_than_the_training_never_reaches_the_peak() -> None:
    schedule = Schedule(type=ScheduleType.COSINE)
    assert [learning_rate_factor(schedule, step, 3, 6) for step in range(3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6])
