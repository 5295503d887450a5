"""``finetune list``: one line per job, as kubectl get."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune.cluster.job import Job
from finetune.cluster.tables import age, short_duration, table

_HEADER = ("NAME", "STATE", "STEP", "TOTAL", "LOSS", "ETA", "METHOD", "NODES", "AGE")


def list_screen(jobs: Sequence[Job], now: datetime, everywhere: bool = False) -> str:
    """A table; ``everywhere`` adds the namespace. What is not known yet stays empty."""
    header = (("NAMESPACE",) if everywhere else ()) + _HEADER
    rows = [((job.namespace,) if everywhere else ()) + _row(job, now) for job in jobs]
    return "\n".join(table(header, rows))


def _row(job: Job, now: datetime) -> tuple[str, ...]:
    progress, plan = job.status.progress, job.status.plan
    total = plan.total_steps if plan and plan.total_steps is not None else progress.total_steps if progress else None
    running = progress is not None and job.ended is None
    return (
        job.name,
        job.state,
        str(progress.step) if progress else "",
        str(total) if total is not None else "",
        (progress.loss or "") if progress else "",
        short_duration(progress.eta_seconds) if running and progress and progress.eta_seconds is not None else "",
        str((job.spec.get("method") or {}).get("type", "")),
        str(job.nodes),
        age(job.created, now),
    )
