"""``finetune status NAME``: everything about one job on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune.cluster.job import Job, parse_time
from finetune.cluster.tables import age, short_duration, table
from finetune.progress_view import duration
from finetune_api.quantities import format_bytes
from finetune_api.status import StatusAttempt, StatusPlan, StatusProgress

_BAR_WIDTH = 30
_REASON_WIDTH = 100
_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits")
NO_EVENTS = "none (the API server keeps them for about an hour)"


@dataclass(frozen=True)
class EventLine:
    """One Event as the screen shows it."""

    at: datetime | None
    type: str
    reason: str
    message: str
    count: int = 1


def status_screen(job: Job, events: Sequence[EventLine], now: datetime) -> str:
    """State and what it waits for, progress, plan, attempts, results, conditions, the last events."""
    sections = [
        list(_head(job, now)),
        list(_results(job, now)),
        list(_plan(job)),
        list(_attempts(job, now)),
        list(_conditions(job, now)),
        ["events", *(_events(events, now) or [f"  {NO_EVENTS}"])],
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _head(job: Job, now: datetime) -> Iterator[str]:
    suspended = ", suspension asked for" if job.suspended and job.state not in {"Suspended", "Suspending"} else ""
    yield f"{job.namespace}/{job.name}   {job.state}{suspended}   created {age(job.created, now)} ago"
    for sentence in job.message.splitlines():
        yield from textwrap.wrap(sentence, 116, break_long_words=False, break_on_hyphens=False)
    progress = job.status.progress
    if progress is not None:
        yield ""
        yield f"  {progress_line(job, progress)}"
        if progress.updated_at and job.ended is None:
            yield f"  as of {age(parse_time(progress.updated_at), now)} ago"


def progress_line(job: Job, progress: StatusProgress) -> str:
    """``[#####-----] step 420/1170 (36 %), loss 1.31, 2,913 tokens/s, about 38 min 00 s left``."""
    total = total_steps(job)
    parts = [f"step {progress.step}"]
    bar = ""
    if total:
        share = min(1.0, progress.step / total)
        filled = round(share * _BAR_WIDTH)
        bar = f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}] "
        parts = [f"step {progress.step}/{total} ({100 * share:.0f} %)"]
    if progress.epoch is not None:
        parts.append(f"epoch {progress.epoch}")
    return bar + ", ".join(parts + progress_numbers(progress, running=job.ended is None))


def progress_numbers(progress: StatusProgress, running: bool = True) -> list[str]:
    """Loss, validation loss, speed and time left, as far as the operator knows."""
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss}")
    if progress.validation_loss is not None:
        parts.append(f"validation loss {progress.validation_loss}")
    if running and progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,} tokens/s")
    if running and progress.eta_seconds is not None:
        parts.append(f"about {duration(progress.eta_seconds)} left")
    return parts


def total_steps(job: Job) -> int | None:
    """Of the plan, else of the progress."""
    plan, progress = job.status.plan, job.status.progress
    if plan is not None and plan.total_steps is not None:
        return plan.total_steps
    return progress.total_steps if progress is not None else None


def _results(job: Job, now: datetime) -> Iterator[str]:
    status = job.status
    if status.checkpoint is not None:
        saved = f", {age(parse_time(status.checkpoint.saved_at), now)} ago" if status.checkpoint.saved_at else ""
        yield f"  checkpoint    step {status.checkpoint.step}{saved}, {status.checkpoint.uri}"
    if status.artifacts is not None:
        artifacts = status.artifacts
        yield f"  artifact      {artifacts.uri}"
        files = f"{artifacts.files} file" + ("s" if artifacts.files != 1 else "")
        size = format_bytes(artifacts.bytes)
        yield f"                {files}, {size}, manifest sha256 {artifacts.manifest_sha256}"
    if status.metrics is not None:
        values = status.metrics.model_dump(by_alias=True, exclude_none=True)
        if values:
            yield "  metrics       " + ", ".join(f"{name} {value}" for name, value in values.items())


def _plan(job: Job) -> Iterator[str]:
    plan = job.status.plan
    if plan is None:
        return
    yield "plan"
    ranks = f"{plan.world_size} rank" + ("s" if plan.world_size != 1 else "")
    nodes = f"{job.nodes} node" + ("s" if job.nodes != 1 else "")
    method = (job.spec.get("method") or {}).get("type", "")
    yield f"  runs on       {ranks} ({nodes} x {plan.world_size // max(1, job.nodes)})"
    yield f"  strategy      {plan.strategy}" + (f", method {method}" if method else "")
    size = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size
    yield (
        f"  batch         {size} per step = {plan.micro_batch_size} per forward x"
        f" {plan.gradient_accumulation_steps} accumulated x {ranks}"
    )
    yield f"  steps         {plan.total_steps if plan.total_steps is not None else 'known once the data is prepared'}"
    if plan.model_revision:
        yield f"  revision      {plan.model_revision}"
    yield from _memory(plan)
    if plan.decisions:
        yield "  chosen for you"
        rows = [(decision.field, decision.value, decision.reason) for decision in plan.decisions]
        yield from _wrapped(rows)
    for warning in plan.warnings:
        yield from textwrap.wrap(f"warning: {warning}", 116, initial_indent="  ", subsequent_indent="    ")


def _memory(plan: StatusPlan) -> Iterator[str]:
    memory = plan.memory_per_device
    if memory is None:
        return
    parts = [(name, getattr(memory, name)) for name in _MEMORY_PARTS]
    listed = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in parts if amount)
    yield f"  memory        {format_bytes(memory.total)} per device" + (f" ({listed})" if listed else "")
    if memory.host:
        yield f"                and {format_bytes(memory.host)} of host memory per rank"


def _wrapped(rows: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Three columns, the last one wrapped below itself."""
    first, second = (min(44, max(len(row[column]) for row in rows)) for column in (0, 1))
    for field, value, reason in rows:
        lead = f"    {field:<{first}}  {value:<{second}}  "
        lines = textwrap.wrap(reason, _REASON_WIDTH) or [""]
        yield (lead + lines[0]).rstrip()
        yield from (" " * len(lead) + line for line in lines[1:])


def _attempts(job: Job, now: datetime) -> Iterator[str]:
    attempts = job.status.attempts
    if not attempts:
        return
    total = job.status.total_attempts or len(attempts)
    causes = ", ".join(f"{known.cause} {known.count}" for known in job.status.restarts)
    notes = [f"the last {len(attempts)} of {total}"] if total > len(attempts) else []
    notes += [f"ended by {causes}"] if causes else []
    yield "attempts" + (f" ({'; '.join(notes)})" if notes else "")
    header = ("#", "STARTED", "RAN", "FROM STEP", "LAST STEP", "LOST", "CAUSE", "EXIT", "MESSAGE")
    yield from table(header, [_attempt(attempt, now) for attempt in attempts], "  ")


def _attempt(attempt: StatusAttempt, now: datetime) -> tuple[str, ...]:
    started = parse_time(attempt.started_at) if attempt.started_at else None
    ended = parse_time(attempt.ended_at) if attempt.ended_at else None
    ran = short_duration(((ended or now) - started).total_seconds()) if started else ""
    return (
        str(attempt.number),
        f"{age(started, now)} ago" if started else "",
        ran,
        _number(attempt.resumed_from_step),
        _number(attempt.last_step),
        _number(attempt.lost_steps),
        attempt.cause or ("" if attempt.ended_at else "running"),
        _number(attempt.exit_code),
        " ".join(filter(None, (attempt.message, _place(attempt)))),
    )


def _place(attempt: StatusAttempt) -> str:
    if not attempt.pod:
        return ""
    return f"(pod {attempt.pod}" + (f" on node {attempt.node})" if attempt.node else ")")


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _conditions(job: Job, now: datetime) -> Iterator[str]:
    if not job.status.conditions:
        return
    yield "conditions"
    rows = [
        (known.type, known.status, known.reason, age(parse_time(known.last_transition_time), now), known.message)
        for known in job.status.conditions
    ]
    yield from table(("TYPE", "STATUS", "REASON", "AGE", "MESSAGE"), rows, "  ")


def _events(events: Sequence[EventLine], now: datetime, last: int = 10) -> list[str]:
    if not events:
        return []
    rows = []
    for event in events[-last:]:
        times = f" (x{event.count})" if event.count > 1 else ""
        rows.append((age(event.at, now), event.type, event.reason, event.message + times))
    return table(("AGE", "TYPE", "REASON", "MESSAGE"), rows, "  ")
