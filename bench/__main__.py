"""``python -m bench``: every measurement of docs/benchmarks.md in one run, written into that page.

Each side runs in a fresh process, sides take turns, medians are reported. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from bench.compare import Row, compare
from bench.jobs import GLOBAL_BATCH, MICRO_BATCH, Case, write_launcher_config, write_loading_config
from bench.material import CACHE, MAXIMUM_LENGTH, REPOSITORY, Material, build, representative
from finetune.local import free_port

PAGE = REPOSITORY / "docs" / "benchmarks.md"
MARKER = "<!-- runs: newest first, written by `make bench` -->"
FASTER, SMALLER, SOONER, OVERHEAD, LOADING = 1.3, 0.8, 0.5, 1.02, 0.6
CASES = [("LoRA", "FP32"), ("LoRA", "BF16"), ("Full", "FP32"), ("Full", "BF16")]


@dataclass(frozen=True)
class Overhead:
    """Ratios of the recipe's step to a bare step."""

    total_ratio: float
    median_ratio: float
    steps: int
    bare_seconds: float


@dataclass(frozen=True)
class Loading:
    """Bytes above the baseline, the worst rank."""

    peak: int
    held: int
    whole: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.peak / self.whole


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each compared run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side and case")
    parser.add_argument("--only", choices=["trl", "overhead", "loading"], action="append", help="default: everything")
    parser.add_argument(
        "--packed", action="store_true", help="also compare packed rows (theirs mixes samples on a CPU)"
    )
    parser.add_argument("--no-page", action="store_true", help="print only")
    options = parser.parse_args()
    parts = options.only or ["trl", "overhead", "loading"]
    started = time.monotonic()
    say("building the material (once) ...")
    material = build()
    runs = CACHE / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    rows = [compare(case, material, options.repeats, runs, say) for case in cases_of(material, options, parts)]
    overheads = (
        [measure_overhead(material, runs, precision) for precision in ("FP32", "BF16")] if "overhead" in parts else []
    )
    loading = measure_loading(material, runs) if "loading" in parts else None
    text, missed = page_section(material, rows, overheads, loading, time.monotonic() - started)
    say("\n" + text)
    if not options.no_page:
        insert(text)
        say(f"written into {PAGE.relative_to(REPOSITORY)}")
    return 1 if missed else 0


def cases_of(material: Material, options: argparse.Namespace, parts: list[str]) -> list[Case]:
    """Four cases over one short epoch of representative rows, and a start with all rows to prepare."""
    if "trl" not in parts:
        return []
    data, tokens = representative(material, options.steps * GLOBAL_BATCH)
    short = {"data": data, "steps": options.steps, "step_tokens": tokens / options.steps}
    cases = [Case(method, precision, **short) for method, precision in CASES]
    if options.packed:
        cases.append(Case("Full", "BF16", **short, packing=True))
    average = sum(material.lengths) / material.rows * GLOBAL_BATCH
    return [*cases, Case("LoRA", "BF16", material.data, 2, average)]


def measure_overhead(material: Material, directory: Path, precision: str) -> Overhead:
    """Recipe and bare steps in turns in one process, LoRA (short steps show overhead best)."""
    place = directory / f"overhead-{precision.lower()}"
    config = write_launcher_config(Case("LoRA", precision, material.data, 12, 0.0), material, place, free_port())
    found = json.loads(_last_line([sys.executable, "-m", "bench.loop_overhead", "--config", str(config)]))
    say(f"  loop overhead {precision}: {found['totalRatio'] - 1:+.2%} ({found['steps']} steps)")
    return Overhead(found["totalRatio"], found["medianRatio"], found["steps"], found["bare"])


def measure_loading(material: Material, directory: Path) -> Loading:
    """Two ranks, FSDP full shard, LoRA in BF16."""
    place = directory / "loading"
    port = free_port()
    config = write_loading_config(material, place, port)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    ranks = json.loads(_last_line([sys.executable, *launch, "-m", "bench.load_memory", "--config", str(config)]))
    say("  loading: " + ", ".join(f"rank {r['rank']} {r['peak'] / 2**20:,.0f} MiB" for r in ranks))
    return Loading(
        peak=max(rank["peak"] for rank in ranks),
        held=max(rank["held"] for rank in ranks),
        whole=ranks[0]["whole"],
        seconds=max(rank["seconds"] for rank in ranks),
    )


def _last_line(command: Sequence[str]) -> str:
    threads = str(max(1, (os.cpu_count() or 1) // (2 if "torch.distributed.run" in command else 1)))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout.splitlines()[-1]


def page_section(
    material: Material, rows: list[Row], overheads: list[Overhead], loading: Loading | None, seconds: float
) -> tuple[str, list[str]]:
    """The run as Markdown, and the targets it missed."""
    missed: list[str] = []

    def judged(what: str, text: str, held: bool) -> str:
        if not held:
            missed.append(what)
        return f"{text} {'✓' if held else '✗'}"

    lines = [f"## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "", *_circumstances(material, seconds), ""]
    if rows:
        columns = ["case", *(name for what in ("tokens/s", "memory", "first step") for name in _columns(what))]
        lines += [
            "| " + " | ".join(columns) + " |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for row in rows:
        label, ours, theirs = row.case.label, row.ours, row.theirs
        speed = judged(f"{label}: tokens/s", f"{row.speed_ratio:.2f}x", row.speed_ratio >= FASTER)
        memory = judged(f"{label}: memory", f"{row.memory_ratio:.2f}x", row.memory_ratio <= SMALLER)
        start = judged(f"{label}: first step", f"{row.start_ratio:.2f}x", row.start_ratio <= SOONER)
        lines.append(
            f"| {label} | {ours.tokens_per_second:,.0f} | {theirs.tokens_per_second:,.0f} | {speed} "
            f"| {ours.peak_bytes / 2**20:,.0f} MiB | {theirs.peak_bytes / 2**20:,.0f} MiB | {memory} "
            f"| {ours.first_step_seconds:.1f} s | {theirs.first_step_seconds:.1f} s | {start} |"
        )
    if overheads or loading:
        lines += ["", "| measurement | result | target |", "|---|---|---|"]
    for precision, one in zip(("FP32", "BF16"), overheads, strict=False):
        text = judged(f"loop overhead {precision}", f"{one.total_ratio - 1:+.2%}", one.total_ratio <= OVERHEAD)
        detail = f"{one.steps} pairs of steps of {one.bare_seconds:.2f} s, median {one.median_ratio - 1:+.2%}"
        lines.append(f"| loop over a bare PyTorch loop, LoRA {precision} | {text} ({detail}) | ≤ 2 % |")
    if loading is not None:
        text = judged("memory while loading", f"{loading.ratio:.2f}x", loading.ratio <= LOADING)
        detail = f"peak {loading.peak / 2**20:,.0f} MiB, held {loading.held / 2**20:,.0f} MiB"
        detail += f", whole model {loading.whole / 2**20:,.0f} MiB"
        lines.append(f"| host memory per rank while loading, FSDP at 2 ranks, LoRA BF16 | {text} ({detail}) | ≤ 0.6x |")
    lines += ["", "Missed targets: " + ("; ".join(missed) if missed else "none") + "."]
    return "\n".join(lines) + "\n", missed


def _columns(what: str) -> tuple[str, str, str]:
    return f"ours {what}", f"TRL {what}", "ratio"


def _circumstances(material: Material, seconds: float) -> list[str]:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return [
        f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"Python {platform.python_version()}, {libraries}; load before the run {os.getloadavg()[2]:.1f}; "
        f"{seconds / 60:.0f} min in all.",
        "",
        f"Llama-style model of {material.parameters / 1e6:.1f}M parameters, vocabulary 32,000; "
        f"{material.rows:,} instructions, "
        f"median {material.median_length}, 90 % below {material.ninetieth_length}, longest {material.longest} tokens "
        f"(maximum {MAXIMUM_LENGTH}); global batch {GLOBAL_BATCH}, micro-batch {MICRO_BATCH}, one process.",
    ]


def _processor() -> str:
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def insert(section: str) -> None:
    """Put the run in front of the earlier ones."""
    before, marker, after = PAGE.read_text().partition(MARKER)
    if not marker:
        raise RuntimeError(f"{PAGE} has lost its marker line '{MARKER}'.")
    PAGE.write_text(f"{before}{marker}\n\n{section}{after}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
