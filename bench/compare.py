"""Ours beside TRL: the same rows, batch, lengths and steps, every run a fresh process, sides taking turns."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import measure
from bench.jobs import ALPHA, GLOBAL_BATCH, MICRO_BATCH, RANK, Case, write_launcher_config
from bench.material import MAXIMUM_LENGTH, Material
from finetune.local import free_port


@dataclass(frozen=True)
class Side:
    """One run's figures."""

    tokens_per_second: float  # tokens that are not padding, after the first step
    peak_bytes: int
    peak_anonymous_bytes: int
    first_step_seconds: float
    last_loss: float


@dataclass(frozen=True)
class Row:
    """Medians of one case on both sides."""

    case: Case
    ours: Side
    theirs: Side

    @property
    def speed_ratio(self) -> float:
        return self.ours.tokens_per_second / self.theirs.tokens_per_second

    @property
    def memory_ratio(self) -> float:
        return self.ours.peak_bytes / self.theirs.peak_bytes

    @property
    def start_ratio(self) -> float:
        return self.ours.first_step_seconds / self.theirs.first_step_seconds


def compare(case: Case, material: Material, repeats: int, directory: Path, say: Callable[[str], None]) -> Row:
    """``repeats`` runs of each side in the order ours, theirs, theirs, ours, ..."""
    runs: dict[str, list[Side]] = {"ours": [], "TRL": []}
    sides = {"ours": run_ours, "TRL": run_trl}
    for repeat in range(repeats):
        for name in reversed(sides) if repeat % 2 else sides:
            place = directory / f"{case.label.replace(' ', '-').lower()}-{name.lower()}-{repeat}"
            shutil.rmtree(place, ignore_errors=True)
            side = sides[name](case, material, place)
            runs[name].append(side)
            say(
                f"  {case.label:<18} {name:<5} {side.tokens_per_second:8,.0f} tokens/s  "
                f"{side.peak_bytes / 2**20:7,.0f} MiB  first step after {side.first_step_seconds:5.1f} s  "
                f"loss {side.last_loss:.3f}"
            )
            shutil.rmtree(place / "output", ignore_errors=True)
    return Row(case, _median(runs["ours"]), _median(runs["TRL"]))


def run_ours(case: Case, material: Material, directory: Path) -> Side:
    """``python -m finetune_trainer``: launcher and one rank, through publication and report."""
    config = write_launcher_config(case, material, directory, free_port())
    command = [sys.executable, "-m", "finetune_trainer", "--config", str(config)]
    seen = measure.run(command, _environment(), directory)
    report = json.loads(next((directory / "work").rglob("report.json")).read_text())
    steps = report["steps"]
    return _side(case, seen, [step["tokens"] for step in steps], steps[-1]["loss"])


def run_trl(case: Case, material: Material, directory: Path) -> Side:
    settings = {
        "method": case.method,
        "precision": case.precision,
        "steps": case.steps,
        "packing": case.packing,
        "plain_loss": True,
        "learning_rate": case.learning_rate,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": MICRO_BATCH,
        "maximum_length": MAXIMUM_LENGTH,
        "rank": RANK,
        "alpha": ALPHA,
        "model": material.model,
        "data": case.data,
        "output": str(directory / "output"),
        "cache": str(directory / "cache"),
        "record": str(directory / "record.json"),
    }
    command = [sys.executable, "-m", "bench.trl_side", "--settings", json.dumps(settings)]
    seen = measure.run(command, _environment() | {"HF_DATASETS_CACHE": str(directory / "cache")}, directory)
    record = json.loads((directory / "record.json").read_text())
    return _side(case, seen, record["tokens"], record["losses"][-1])


def _side(case: Case, seen: measure.Measurement, tokens: list[float], last_loss: float) -> Side:
    """One run; its first step is put at the tokens of an average one (length grouping begins with the longest)."""
    assert len(tokens) == len(seen.step_times), (tokens, seen.step_times)
    rate = sum(tokens[1:]) / seen.seconds_between_steps()
    return Side(
        tokens_per_second=rate,
        peak_bytes=seen.peak_bytes,
        peak_anonymous_bytes=seen.peak_anonymous_bytes,
        first_step_seconds=seen.first_step_seconds + (case.step_tokens - tokens[0]) / rate,
        last_loss=last_loss,
    )


def _median(sides: list[Side]) -> Side:
    return Side(
        tokens_per_second=median(side.tokens_per_second for side in sides),
        peak_bytes=int(median(side.peak_bytes for side in sides)),
        peak_anonymous_bytes=int(median(side.peak_anonymous_bytes for side in sides)),
        first_step_seconds=median(side.first_step_seconds for side in sides),
        last_loss=median(side.last_loss for side in sides),
    )


def _environment() -> dict[str, str]:
    """The same threads for both, no network."""
    threads = str(os.cpu_count() or 1)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", **offline}
