"""What was measured, and the table that says whether it is good enough."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.scale.measures import Burst, Cost, Idle, Restart, Rollout

RATIO, BURST_SECONDS, RESIDENT_BYTES, REQUESTS, SERVED_SECONDS = 1.5, 1.0, 250e6, 5.0, 3.0
IDLE_CPU, IDLE_REQUESTS_PER_SECOND = 0.01, 1.0


@dataclass
class Results:
    """One run."""

    floor: list[Rollout] = field(default_factory=list)
    floor_after: list[Rollout] = field(default_factory=list)  # the same once more, when the operator is done
    burst_floor: list[Burst] = field(default_factory=list)  # before and after
    operator: list[Rollout] = field(default_factory=list)
    cost: list[Cost] = field(default_factory=list)
    live: Idle | None = None
    restart: Restart | None = None
    idle: Idle | None = None


def table(results: Results) -> tuple[str, list[str]]:
    """The run as Markdown, and the targets that it missed."""
    rows: list[tuple[str, str, str, bool]] = []
    for before, ours, after in zip(results.floor, results.operator, results.floor_after, strict=False):
        ratio = 2 * ours.seconds / (before.seconds + after.seconds)
        figures = (
            f"{ours.seconds:.1f} s beside {before.seconds:.1f} s before and {after.seconds:.1f} s after: {ratio:.2f}x"
        )
        rows.append(
            (f"{ours.jobs:,} jobs, 2 pods each, until all run, beside the floor", figures, "≤ 1.5x", ratio <= RATIO)
        )
    if results.operator:
        rows.append(_burst_row(results))
    for ours, cost in zip(results.operator, results.cost, strict=False):
        what = f"operator's requests per job until Running, {ours.jobs:,} jobs"
        rows.append((what, f"{cost.requests_per_job:.2f}", "≤ 5", cost.requests_per_job <= REQUESTS))
    if results.cost:
        peak = max(cost.peak_bytes for cost in results.cost)
        rows.append(("operator's memory, most", f"{peak / 1e6:,.0f} MB", "≤ 250 MB", peak <= RESIDENT_BYTES))
    if results.restart:
        rows += _restart_rows(results.restart)
    if results.live:
        rows.append((f"{results.live.jobs:,} live jobs whose pods stand still", _idle_text(results.live), "", True))
    if results.idle:
        good = (
            results.idle.cpu_seconds / results.idle.seconds <= IDLE_CPU
            and results.idle.requests_per_second <= IDLE_REQUESTS_PER_SECOND
            and results.idle.writes == 0
        )
        rows.append((f"{results.idle.jobs:,} finished jobs", _idle_text(results.idle), "CPU ≤ 1 %, no writes", good))
        small = results.idle.peak_bytes <= RESIDENT_BYTES
        rows.append(("its memory, most", f"{results.idle.peak_bytes / 1e6:,.0f} MB", "≤ 250 MB", small))
    lines = ["| measurement | result | target |", "|---|---|---|"]
    lines += [
        f"| {what} | {figures}{'' if not target else ' ✓' if good else ' ✗'} | {target} |"
        for what, figures, target, good in rows
    ]
    return "\n".join([*lines, "", *_cpu_lines(results)]), [
        what for what, _, target, good in rows if target and not good
    ]


def _burst_row(results: Results) -> tuple[str, str, str, bool]:
    ours = results.operator[0].burst
    assert ours is not None, "a rollout of the operator has delays"
    figures = f"p50 {ours.p50_seconds:.2f} s, p99 {ours.p99_seconds:.2f} s"
    if results.burst_floor:
        bare = " and ".join(f"{one.p99_seconds:.2f} s" for one in results.burst_floor)
        figures += f" (a bare client that makes the same objects: p99 {bare})"
    what = f"FineTuneJob → Job, burst of {results.operator[0].jobs:,}"
    return what, figures, "p99 ≤ 1 s", ours.p99_seconds <= BURST_SECONDS


def _restart_rows(restart: Restart) -> list[tuple[str, str, str, bool]]:
    served = f"{restart.served_seconds:.2f} s (ready after {restart.ready_seconds:.2f} s, "
    served += f"stopped in {restart.stop_seconds:.2f} s)"
    return [
        (
            f"restart with {restart.live_jobs:,} live jobs: process start → Job of a new FineTuneJob",
            served,
            "≤ 3 s",
            restart.served_seconds <= SERVED_SECONDS,
        ),
        ("writes to the jobs that were there", f"{restart.writes_to_old_jobs}", "0", restart.writes_to_old_jobs == 0),
    ]


def _idle_text(found: Idle) -> str:
    return (
        f"{found.cpu_seconds / found.seconds:.2%} of a core, {found.requests_per_second:.2f} requests/s, "
        f"{found.writes} writes in {found.seconds:g} s, {found.resident_bytes / 1e6:,.0f} MB"
    )


def _cpu_lines(results: Results) -> list[str]:
    """CPU milliseconds per job by process: where the time goes."""
    runs = [
        *(("floor", run) for run in results.floor),
        *(("operator", run) for run in results.operator),
        *(("floor after", run) for run in results.floor_after),
    ]
    if not runs:
        return []
    names = list(dict.fromkeys(name for _, run in runs for name in run.cpu_seconds))
    lines = ["| CPU ms per job | " + " | ".join(names) + " | all |", "|---|" + "--:|" * (len(names) + 1)]
    for label, run in runs:
        shares = [run.cpu_seconds.get(name, 0.0) / run.jobs * 1000 for name in names]
        cells = " | ".join(f"{share:.1f}" for share in [*shares, sum(shares)])
        lines.append(f"| {label}, {run.jobs:,} jobs | {cells} |")
    return lines
