"""Geometry of the report's line charts: scales, ticks, paths and hover cells. The template draws them as inline SVG.

Long runs are drawn in at most ``MAXIMUM_COLUMNS`` columns: the line goes through the mean of a column, a pale band
spans its minimum and maximum, so a spike of one step in 100,000 stays visible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

from finetune_trainer.report_values import number

MAXIMUM_COLUMNS = 360
LOG_SCALE_FROM = 50.0  # largest over median: a linear axis would show one spike and a flat line


@dataclass(frozen=True)
class Panel:
    """Size and margins of a chart in SVG user units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


@dataclass(frozen=True)
class Series:
    """One line: ``xs`` ascending steps, ``ys`` values of the same length, ``style`` a colour class of the template."""

    label: str
    style: str
    xs: Sequence[int]
    ys: Sequence[float]
    smooth: bool = False  # draw a moving average over the pale raw line
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step."""

    step: int
    label: str
    best: bool = False


@dataclass(frozen=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True)
class Column:
    """Neighbouring points drawn as one."""

    first: int
    last: int
    mean: float
    low: float
    high: float

    @property
    def centre(self) -> float:
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Drawn:
    """A series in SVG coordinates; empty strings are not drawn."""

    label: str
    style: str
    raw: str
    line: str
    band: str
    dots: tuple[tuple[float, float, str], ...]  # x, y, hover title


@dataclass(frozen=True)
class Cell:
    """A transparent column that carries a hover title, and the point it speaks of."""

    x: float
    width: float
    title: str


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    panel: Panel
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Drawn, ...]
    cells: tuple[Cell, ...]
    marks: tuple[tuple[float, str, bool], ...]
    logarithmic: bool
    summary: str


@dataclass
class _Axes:
    """Data to SVG coordinates."""

    panel: Panel
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    logarithmic: bool = False
    _y: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._y = (math.log10(self.y_range[0]), math.log10(self.y_range[1])) if self.logarithmic else self.y_range

    def x(self, step: float) -> float:
        low, high = self.x_range
        span = self.panel.width - self.panel.left - self.panel.right
        return round(self.panel.left + span * (step - low) / (high - low), 2)

    def y(self, value: float) -> float:
        low, high = self._y
        scaled = math.log10(max(value, self.y_range[0])) if self.logarithmic else value
        span = self.panel.height - self.panel.top - self.panel.bottom
        return round(self.panel.top + span * (1 - (scaled - low) / (high - low)), 2)


def draw(
    title: str, unit: str, series: Sequence[Series], panel: Panel, marks: Sequence[Mark] = (), *, zero: bool = False
) -> Chart | None:
    """A chart of the series that have points; None when none has. ``zero`` lets a linear axis start at 0."""
    present = [one for one in series if one.xs]
    if not present:
        return None
    axes = _axes(present, panel, zero)
    y_ticks = _log_ticks(axes.y_range) if axes.logarithmic else _ticks(axes.y_range, 5)
    columns = {one.label: _columns(one) for one in present}
    first = present[0]
    return Chart(
        title=title,
        unit=unit,
        panel=panel,
        x_ticks=tuple(Tick(axes.x(value), f"{value:,.0f}") for value in _whole_ticks(axes.x_range)),
        y_ticks=tuple(Tick(axes.y(value), number(value)) for value in y_ticks),
        series=tuple(_drawn(one, columns[one.label], axes) for one in present),
        cells=_cells(first, columns[first.label], axes) if not first.dots else (),
        marks=tuple((axes.x(m.step), m.label, m.best) for m in marks if axes.x_range[0] <= m.step <= axes.x_range[1]),
        logarithmic=axes.logarithmic,
        summary="; ".join(f"{one.label} from {number(one.ys[0])} to {number(one.ys[-1])}" for one in present),
    )


def _axes(series: Sequence[Series], panel: Panel, zero: bool) -> _Axes:
    steps = [step for one in series for step in (one.xs[0], one.xs[-1])]
    values = [value for one in series for value in one.ys]
    low, high = min(values), max(values)
    x_range = (min(steps), max(steps)) if max(steps) > min(steps) else (min(steps) - 1, max(steps) + 1)
    if low > 0 and high / median(values) > LOG_SCALE_FROM:
        return _Axes(panel, x_range, (low / 1.1, high * 1.1), logarithmic=True)
    if zero:
        low = min(0.0, low)
    if high <= low:
        pad = abs(high) * 0.5 or 1.0
        low, high = low - pad, high + pad
    step = _tick_step((low, high), 5)
    return _Axes(panel, x_range, (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step))


def _columns(series: Series) -> list[Column]:
    width = math.ceil(len(series.xs) / MAXIMUM_COLUMNS)
    columns = []
    for start in range(0, len(series.xs), width):
        xs, ys = series.xs[start : start + width], series.ys[start : start + width]
        columns.append(Column(xs[0], xs[-1], fmean(ys), min(ys), max(ys)))
    return columns


def _drawn(series: Series, columns: list[Column], axes: _Axes) -> Drawn:
    points = [(axes.x(column.centre), axes.y(column.mean)) for column in columns]
    merged = any(column.first != column.last for column in columns)
    smoothed = series.smooth and len(columns) >= 8
    line = [(x, axes.y(y)) for (x, _), y in zip(points, _moving_average(columns), strict=True)] if smoothed else points
    band = ""
    if merged:
        upper = [(axes.x(column.centre), axes.y(column.high)) for column in columns]
        lower = [(axes.x(column.centre), axes.y(column.low)) for column in reversed(columns)]
        band = _path(upper + lower) + "Z"
    show_dots = series.dots or len(columns) == 1
    dots = tuple(
        (x, y, f"step {column.last:,}: {series.label} {number(column.mean)}")
        for (x, y), column in zip(points, columns, strict=True)
        if show_dots
    )
    return Drawn(series.label, series.style, _path(points) if smoothed else "", _path(line), band, dots)


def _moving_average(columns: list[Column]) -> list[float]:
    """Centred mean over about a twentieth of the columns; the window shrinks towards the ends."""
    reach = max(1, len(columns) // 40)
    means = [column.mean for column in columns]
    smoothed = []
    for index in range(len(means)):
        near = min(reach, index, len(means) - 1 - index)
        smoothed.append(fmean(means[index - near : index + near + 1]))
    return smoothed


def _cells(series: Series, columns: list[Column], axes: _Axes) -> tuple[Cell, ...]:
    """One hover cell per column, each reaching half-way to its neighbours."""
    centres = [axes.x(column.centre) for column in columns]
    left, right = axes.panel.left, axes.panel.width - axes.panel.right
    edges = [left, *((a + b) / 2 for a, b in pairwise(centres)), right]
    cells = []
    for column, start, end in zip(columns, edges[:-1], edges[1:], strict=True):
        if column.first == column.last:
            title = f"step {column.first:,}: {series.label} {number(column.mean)}"
        else:
            spread = f"{number(column.low)} to {number(column.high)}"
            title = f"steps {column.first:,} to {column.last:,}: {series.label} {number(column.mean)} ({spread})"
        cells.append(Cell(round(start, 2), round(end - start, 2), title))
    return tuple(cells)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _ticks(bounds: tuple[float, float], wanted: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within ``bounds``, about ``wanted`` of them."""
    low, high = bounds
    step = _tick_step(bounds, wanted)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tick_step(bounds: tuple[float, float], wanted: int) -> float:
    rough = (bounds[1] - bounds[0]) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _whole_ticks(bounds: tuple[float, float]) -> list[float]:
    """Ticks of the step axis: whole numbers only."""
    return [tick for tick in _ticks(bounds, 8) if abs(tick - round(tick)) < 1e-6]


def _log_ticks(bounds: tuple[float, float]) -> list[float]:
    powers = range(math.floor(math.log10(bounds[0])), math.ceil(math.log10(bounds[1])) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [f * 10.0**p for p in powers for f in factors if bounds[0] <= f * 10.0**p <= bounds[1]]
