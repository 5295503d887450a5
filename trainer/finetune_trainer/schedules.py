"""Learning rate schedules: pure functions of the optimizer step, so that resuming needs no scheduler state.

Each schedule answers with a factor of ``training.learningRate``. ``step`` is 0-based: the factor of step 0 is used by
the first optimizer step and is never zero. Formulas and references: docs/schedules.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from finetune_api.spec import Schedule, ScheduleType


def learning_rate_factor(schedule: Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
    """Factor of the peak learning rate for optimizer step ``step`` (0-based), in (0, 1] for ``step < total_steps``.

    ``warmup_steps`` is the resolved warm-up of the plan. OneCycle and SlantedTriangular rise on their own
    (``peakFraction``, ``initialRatio``) and do not use it.
    """
    assert total_steps >= 1, f"total_steps is {total_steps}"
    assert step >= 0, f"step is {step}"
    assert warmup_steps >= 0, f"warmup_steps is {warmup_steps}"
    return _SCHEDULES[schedule.type](schedule, step, total_steps, warmup_steps)


def _decaying(shape: Callable[[Schedule, float], float]) -> Callable[[Schedule, int, int, int], float]:
    """Linear warm-up, then ``shape`` of the progress in [0, 1], scaled to end at ``minimumFraction``."""

    def factor(schedule: Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = _progress(step, warmup_steps, total_steps)
        return _between(schedule.minimum_fraction, 1.0, shape(schedule, progress))

    return factor


def _linear(_: Schedule, progress: float) -> float:
    return 1.0 - progress


def _cosine(schedule: Schedule, progress: float) -> float:
    """Loshchilov & Hutter 2017 (arXiv:1608.03983); every cycle starts again at the peak."""
    if progress >= 1.0:
        return 0.0
    return _half_cosine(schedule.cycles * progress % 1.0)


def _polynomial(schedule: Schedule, progress: float) -> float:
    return (1.0 - progress) ** schedule.power


def _constant(_schedule: Schedule, step: int, _total_steps: int, warmup_steps: int) -> float:
    return (step + 1) / warmup_steps if step < warmup_steps else 1.0


def _inverse_square_root(schedule: Schedule, step: int, _total_steps: int, warmup_steps: int) -> float:
    """Vaswani et al. 2017 (arXiv:1706.03762), scaled so that the peak is 1 at the end of the warm-up."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(schedule.minimum_fraction, math.sqrt(max(warmup_steps, 1) / (step + 1)))


def _warmup_stable_decay(schedule: Schedule, step: int, total_steps: int, warmup_steps: int) -> float:
    """Hu et al. 2024 (arXiv:2404.06395) with the linear decay of Hägele et al. 2024 (arXiv:2405.18392)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay_start = max(warmup_steps, total_steps - round(schedule.decay_fraction * total_steps))
    if step < decay_start:
        return 1.0
    return _between(schedule.minimum_fraction, 1.0, 1.0 - _progress(step, decay_start, total_steps))


def _one_cycle(schedule: Schedule, step: int, total_steps: int, _warmup_steps: int) -> float:
    """Smith 2018 (arXiv:1803.09820) in two phases with cosine legs: up from 1/initialRatio, down to minimumFraction."""
    peak = math.floor(total_steps * schedule.peak_fraction)
    if step < peak:
        return _between(1.0 / schedule.initial_ratio, 1.0, 1.0 - _half_cosine(step / peak))
    return _between(schedule.minimum_fraction, 1.0, _half_cosine(_progress(step, peak, total_steps)))


def _slanted_triangular(schedule: Schedule, step: int, total_steps: int, _warmup_steps: int) -> float:
    """Howard & Ruder 2018 (arXiv:1801.06146), section 3.2: a short rise, a long fall to 1/initialRatio."""
    cut = math.floor(total_steps * schedule.peak_fraction)
    height = step / cut if step < cut else 1.0 - _progress(step, cut, total_steps)
    return max(schedule.minimum_fraction, _between(1.0 / schedule.initial_ratio, 1.0, height))


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from ``start`` to ``end``, 1 from ``end`` on."""
    return min(1.0, (step - start) / (end - start)) if end > start else 1.0


def _half_cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


_SCHEDULES: dict[ScheduleType, Callable[[Schedule, int, int, int], float]] = {
    ScheduleType.CONSTANT: _constant,
    ScheduleType.LINEAR: _decaying(_linear),
    ScheduleType.COSINE: _decaying(_cosine),
    ScheduleType.POLYNOMIAL: _decaying(_polynomial),
    ScheduleType.INVERSE_SQUARE_ROOT: _inverse_square_root,
    ScheduleType.WARMUP_STABLE_DECAY: _warmup_stable_decay,
    ScheduleType.ONE_CYCLE: _one_cycle,
    ScheduleType.SLANTED_TRIANGULAR: _slanted_triangular,
}
