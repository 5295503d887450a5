"""``finetune report``: what a finished job says about itself, on a screen."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from finetune.progress_view import duration
from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_api.quantities import format_bytes
from finetune_api.report import Report

_PLACES = (".", "report", "node-*/report")


class ReportMissingError(FineTuneError):
    """No readable report where one was named."""

    exit_class = ExitClass.INVALID_SPEC


def read_report(place: str) -> tuple[Report, str]:
    """The report in a run directory, a report directory or an artifact, and where its ``report.html`` is."""
    text, html = _from_store(place) if "://" in place else _from_directory(Path(place))
    try:
        return Report.model_validate_json(text), html
    except ValidationError as error:
        raise ReportMissingError(
            f"the report.json at {place} is not one of ours ({error.error_count()} problems)",
            "see whether it was written by this version of finetune",
        ) from error


def _from_directory(directory: Path) -> tuple[bytes, str]:
    for pattern in _PLACES:
        for folder in sorted(directory.glob(pattern)) if pattern != "." else [directory]:
            if (folder / "report.json").is_file():
                return (folder / "report.json").read_bytes(), str((folder / "report.html").absolute())
    raise ReportMissingError(
        f"there is no report.json in {directory}",
        "name the run directory that finetune run printed, or the URI of the artifact",
    )


def _from_store(uri: str) -> tuple[bytes, str]:
    from finetune_storage import ObjectStore, find_artifact

    place, _, _ = find_artifact(ObjectStore.open(uri))
    return place.get("report.json"), place.join("report.html")


def report_screen(report: Report, html: str) -> str:
    """Losses before and after, speed, memory, samples, and where the page is."""
    plan = report.plan
    title = f"{report.job.get('namespace', 'default')}/{report.job.get('name', '?')}"
    lines = [title, ""]
    if report.steps:
        first, last = report.steps[0], report.steps[-1]
        lines.append(f"  training loss    {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}")
    if report.evaluations:
        base, final = report.evaluations[0], report.evaluations[-1]
        lines.append(f"  validation loss  {base.loss:.4f} at step {base.step}, {final.loss:.4f} at step {final.step}")
    if report.best_step is not None:
        lines.append(f"  best step        {report.best_step}" + (" (stopped early)" if report.stopped_early else ""))
    seconds = sum(step.seconds for step in report.steps)
    tokens = sum(step.tokens for step in report.steps)
    if seconds:
        lines.append(f"  speed            {tokens / seconds:,.0f} tokens/s over {tokens:,} tokens")
    peak = max((step.memory_bytes for step in report.steps), default=0)
    if peak:
        lines.append(f"  memory           {format_bytes(peak)} at most")
    lines.append(f"  ran as           {plan.strategy.label}, {plan.world_size} rank(s), {duration(report.seconds)}")
    if uri := report.artifact.get("uri"):
        lines.append(f"  artifact         {uri}")
    for sample in report.samples[:1]:
        lines += ["", f"  prompt   {_short(sample.prompt)}"]
        lines += [f"  before   {_short(sample.before)}", f"  after    {_short(sample.after)}"]
    return "\n".join([*lines, "", f"report: {html}"])


def _short(text: str, length: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 3] + "..."
