"""globalBatchSize = microBatchSize x accumulation x world size, exactly: nothing is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil, isqrt

from finetune_api.errors import Problem
from finetune_api.spec import FineTuneJobSpec, Schedule, ScheduleType

DEFAULT_WARMUP_FRACTION = Fraction(3, 100)
DEFAULT_EPOCHS = 1.0
SELF_RISING = frozenset({ScheduleType.ONE_CYCLE, ScheduleType.SLANTED_TRIANGULAR})  # they rise by peakFraction
GLOBAL_BATCH = "spec.training.globalBatchSize"
MICRO_BATCH = "spec.training.microBatchSize"


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def nearest_multiples(number: int, unit: int) -> list[int]:
    """The multiples of ``unit`` just below and above ``number`` (which is none itself); never zero."""
    below = number // unit * unit
    return [below, below + unit] if below else [unit]


def batch_problems(spec: FineTuneJobSpec, world_size: int) -> Iterator[Problem]:
    """Why the global batch cannot be dealt to the ranks, with the nearest numbers that can."""
    total, micro = spec.training.global_batch_size, spec.training.micro_batch_size
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    if total % world_size:
        unit = world_size * (micro or 1)
        yield Problem(
            path=GLOBAL_BATCH,
            value=total,
            rule=f"must be a multiple of {unit} ({ranks}{f' x microBatchSize {micro}' if micro else ''})",
            remedy=f"use {_either(nearest_multiples(total, unit))}",
        )
    elif micro is not None and (total // world_size) % micro:
        share = total // world_size
        sizes = [d for d in divisors(share) if d != micro]
        near = sorted(sorted(sizes, key=lambda size: (abs(size - micro), size))[:2])
        yield Problem(
            path=MICRO_BATCH,
            value=micro,
            rule=f"must divide the {share} samples per step of each rank (globalBatchSize {total} / {ranks})",
            remedy=f"use {_either(near)}, or globalBatchSize {_either(nearest_multiples(total, world_size * micro))}",
        )


def _either(numbers: list[int]) -> str:
    return " or ".join(str(number) for number in numbers)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``limit``; at least 1."""
    return max((d for d in divisors(number) if d <= limit), default=1)


def exact_fraction(value: float) -> Fraction:
    """The decimal number that the user wrote: 0.1 is one tenth, so that 0.1 x 30 is 3."""
    return Fraction(repr(value))


def total_steps(spec: FineTuneJobSpec, samples: int) -> int:
    """Optimizer steps: ``maxSteps``, or the epochs' samples over the global batch, rounded up (at least 1)."""
    if spec.training.max_steps is not None:
        return spec.training.max_steps
    epochs = exact_fraction(spec.training.epochs or DEFAULT_EPOCHS)
    return max(1, ceil(epochs * samples / spec.training.global_batch_size))


def steps_per_epoch(spec: FineTuneJobSpec, samples: int) -> int:
    """Steps until every sample was seen once; the last may reach into the next epoch."""
    return max(1, ceil(Fraction(samples, spec.training.global_batch_size)))


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Warm-up steps of ``steps``: as given, or the fraction of them rounded up; 0 where the schedule rises itself."""
    if schedule.type in SELF_RISING:
        return 0
    if schedule.warmup_steps is not None:
        return min(schedule.warmup_steps, steps)
    given = schedule.warmup_fraction
    fraction = DEFAULT_WARMUP_FRACTION if given is None else exact_fraction(given)
    return min(steps, ceil(fraction * steps))
