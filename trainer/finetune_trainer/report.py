"""The report of a job: ``report.json`` (everything) and ``report.html`` (rendered from it alone, self-contained).

The page needs no network and no JavaScript: charts are inline SVG with hover titles, colours follow the reader's light
or dark setting, and it prints. ``report_charts.py`` computes the geometry, ``report_values.py`` the wording of values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from finetune_api.report import EvaluationRecord, Report, StepRecord
from finetune_trainer import report_values as values
from finetune_trainer.report_charts import Chart, Mark, Panel, Series, draw

LARGE = Panel(width=1040, height=360, left=58, right=18, top=16, bottom=38)
SMALL = Panel(width=510, height=236, left=58, right=14, top=14, bottom=34)


@dataclass(frozen=True)
class ReportFiles:
    """Where ``write_report`` put its two files."""

    json_path: Path
    html_path: Path


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    note: str = ""
    unit: str = ""
    tone: str = ""  # "good" | "bad" | ""


def write_report(report: Report, directory: Path) -> ReportFiles:
    """Write ``report.json`` and ``report.html`` into ``directory`` (made if absent); each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    files = ReportFiles(directory / "report.json", directory / "report.html")
    _write_whole(files.json_path, report.model_dump_json(by_alias=True, indent=1) + "\n")
    _write_whole(files.html_path, render_html(report))
    return files


def render_html(report: Report) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("finetune_trainer", "report_template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "words": values.words,
        "show": values.show,
        "figure": values.figure,
        "count": values.count,
        "size": values.size,
        "duration": values.duration,
        "instant": values.instant,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        plan=report.plan,
        headline=_headline(report),
        tiles=_tiles(report),
        loss_chart=_loss_chart(report),
        charts=_small_charts(report.steps),
        plan_rows=_plan_rows(report),
        memory_parts=_memory_parts(report),
        self_check=values.compare_ranks(report.self_check),
        dataset_rows=values.flatten(report.dataset),
        environment_rows=values.flatten(report.environment),
        metric_rows=values.flatten(report.metrics),
        artifact_rows=values.flatten({key: value for key, value in report.artifact.items() if key != "files"}),
        artifact_files=values.listing(report.artifact.get("files")),
        spec_lines=values.outline(report.spec),
    )


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _headline(report: Report) -> str:
    """One sentence: what was done to what, and whether it helped."""
    plan, ranks = report.plan, report.plan.world_size
    model = str(report.spec.get("model", {}).get("uri", "")) if isinstance(report.spec.get("model"), dict) else ""
    shape = (
        f"{plan.method.value} with {plan.strategy.label} on {ranks} {'rank' if ranks == 1 else 'ranks'} ({plan.device})"
    )
    return f"{shape}, base model {model}" if model else shape


def _tiles(report: Report) -> list[Tile]:
    steps = report.steps
    tiles = []
    base, tuned = _base_and_tuned(report)
    if tuned is not None:
        tiles.append(_validation_tile(base, tuned))
    if steps:
        last = steps[-min(len(steps), max(1, len(steps) // 20)) :]
        mean = sum(step.loss for step in last) / len(last)
        note = f"mean of the last {len(last)} steps" if len(last) > 1 else f"step {last[0].step}"
        tiles.append(Tile("Training loss", values.figure(mean), f"{note}; first {values.figure(steps[0].loss)}"))
        tokens, seconds = sum(step.tokens for step in steps), sum(step.seconds for step in steps)
        if seconds > 0:
            share = sum(step.supervised_tokens for step in steps) / max(1, tokens)
            note = f"{values.count(tokens)} tokens, {share:.0%} carried loss"
            tiles.append(Tile("Throughput", values.count(round(tokens / seconds)), note, "tokens/s"))
        note = (
            f"early stop; best is step {report.best_step}"
            if report.stopped_early
            else f"of {values.count(report.plan.total_steps)} planned"
            if report.plan.total_steps
            else ""
        )
        tiles.append(Tile("Steps", values.count(len(steps)), note))
    if report.seconds > 0:
        tiles.append(Tile("Wall clock", values.duration(report.seconds), values.instant(report.finished_at)))
    peak = max((step.memory_bytes for step in steps), default=0)
    if peak:
        tiles.append(
            Tile(
                "Peak memory",
                values.size(peak),
                "fullest rank, " + ("host" if report.plan.device == "cpu" else "device"),
            )
        )
    return tiles


def _base_and_tuned(report: Report) -> tuple[EvaluationRecord | None, EvaluationRecord | None]:
    """The evaluation before training, and the one of what was published (the best step, else the last)."""
    if not report.evaluations:
        return None, None
    base = report.evaluations[0] if report.evaluations[0].step == 0 else None
    best = [record for record in report.evaluations if record.step == report.best_step]
    return base, (best or list(report.evaluations))[-1]


def _validation_tile(base: EvaluationRecord | None, tuned: EvaluationRecord) -> Tile:
    if base is None or base is tuned:
        return Tile("Validation loss", values.figure(tuned.loss), f"accuracy {tuned.token_accuracy:.1%}")
    change = (tuned.loss - base.loss) / base.loss if base.loss else 0.0
    accuracy = f"accuracy {base.token_accuracy:.1%} → {tuned.token_accuracy:.1%}"
    note = f"base {values.figure(base.loss)} ({change:+.1%}); {accuracy}"
    return Tile("Validation loss", values.figure(tuned.loss), note, tone="good" if change < 0 else "bad")


def _loss_chart(report: Report) -> Chart | None:
    train = Series("training loss", "c1", [s.step for s in report.steps], [s.loss for s in report.steps], smooth=True)
    held_out = Series(
        "validation loss", "c2", [e.step for e in report.evaluations], [e.loss for e in report.evaluations], dots=True
    )
    marks = [
        Mark(step, f"resumed from step {step}")
        for attempt in report.attempts
        if (step := _resumed_from(attempt)) is not None
    ]
    if report.best_step is not None:
        marks.append(Mark(report.best_step, f"best: step {report.best_step}", best=True))
    return draw("Loss", "", [train, held_out], LARGE, marks)


def _resumed_from(attempt: dict[str, Any]) -> int | None:
    step = attempt.get("resumedFromStep", attempt.get("resumed_from_step"))
    return step if isinstance(step, int) and step > 0 else None


def _small_charts(steps: tuple[StepRecord, ...]) -> list[Chart]:
    at = [step.step for step in steps]
    normed = [step for step in steps if step.gradient_norm is not None]
    timed = [step for step in steps if step.seconds > 0]
    measured = [step for step in steps if step.memory_bytes > 0]
    panels = [
        draw(
            "Learning rate", "", [Series("learning rate", "c3", at, [s.learning_rate for s in steps])], SMALL, zero=True
        ),
        draw(
            "Throughput",
            "tokens/s",
            [Series("tokens/s", "c4", [s.step for s in timed], [s.tokens / s.seconds for s in timed], smooth=True)],
            SMALL,
            zero=True,
        ),
        draw(
            "Gradient norm",
            "",
            [
                Series(
                    "gradient norm",
                    "c5",
                    [s.step for s in normed],
                    [s.gradient_norm or 0.0 for s in normed],
                    smooth=True,
                )
            ],
            SMALL,
            zero=True,
        ),
        draw(
            "Memory",
            "GiB",
            [Series("memory", "c6", [s.step for s in measured], [s.memory_bytes / 2**30 for s in measured])],
            SMALL,
            zero=True,
        ),
    ]
    return [chart for chart in panels if chart is not None]


def _plan_rows(report: Report) -> list[tuple[str, str]]:
    plan = report.plan
    rows = [
        ("method", plan.method.value),
        ("strategy", plan.strategy.label),
        ("world size", f"{plan.world_size} ({plan.nodes} × {plan.processes_per_node}, {plan.device})"),
        ("precision", plan.precision.value),
        (
            "global batch",
            f"{plan.global_batch_size} = {plan.micro_batch_size} micro-batch × "
            f"{plan.gradient_accumulation_steps} accumulation × {plan.world_size} ranks",
        ),
        ("gradient checkpointing", plan.gradient_checkpointing.value),
        ("total steps", values.show(plan.total_steps)),
        ("steps per epoch", values.show(plan.steps_per_epoch)),
        ("warm-up steps", values.show(plan.warmup_steps)),
    ]
    if plan.parameters is not None:
        counts = plan.parameters
        share = counts.trainable / counts.total if counts.total else 0.0
        rows.append(("parameters", values.count(counts.total) + ("" if counts.exact else " (estimated)")))
        rows.append(("trainable", f"{values.count(counts.trainable)} ({share:.2%})"))
        if counts.quantized:
            rows.append(("stored in 4 bit", values.count(counts.quantized)))
    rows.append(("model revision", plan.model_revision or "none"))
    rows.append(("output format", plan.output_format.value))
    rows.append(("artifact prefix", plan.artifact_prefix))
    rows.append(("checkpoint prefix", plan.checkpoint_prefix))
    return rows


def _memory_parts(report: Report) -> list[tuple[str, int, float]]:
    """(part, bytes, share) of the planned memory per device, empty without an estimate."""
    memory = report.plan.memory_per_device
    if memory is None or memory.total <= 0:
        return []
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    return [(part, getattr(memory, part), getattr(memory, part) / memory.total) for part in parts]
