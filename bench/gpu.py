"""``python -m bench.gpu``: tokens/s, model FLOPs utilisation and peak memory on one GPU, with random weights.

Rows are synthetic tokens, every row one segment (the most attention a row can need) with loss on all but 3 tokens.
Each case prints one line; ``--profile`` adds the kernels that one step spends its time in.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gpu_jobs import LLAMA_1B, LLAMA_3B, LLAMA_8B, Shape, join, worker_config, write_data, write_model
from finetune_trainer.data import collate, deal
from finetune_trainer.distributed import RankContext
from finetune_trainer.evaluation import to_device
from finetune_trainer.progress import HeartbeatWriter, StopSignal
from finetune_trainer.recipe import Run

WARM_UP = 2
SHAPES = {"8b": LLAMA_8B, "3b": LLAMA_3B, "1b": LLAMA_1B}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    name: str
    shape: str
    method: str  # "Full" | "LoRA" | "QLoRA"
    row: int  # tokens
    micro: int
    checkpointing: str = "None"
    optimizer: str = "AdamW"
    strategy: str = "DDP"
    accumulation: int = 2
    bare: bool = False  # a bare loop takes turns with the recipe

    def values(self, steps: int) -> dict[str, Any]:
        """The job's fields."""
        return {
            "method": {"type": self.method, **({} if self.method == "Full" else {"lora": {"rank": 16}})},
            "training": {
                "maxSteps": steps,
                "globalBatchSize": self.micro * self.accumulation,
                "microBatchSize": self.micro,
                "learningRate": 1e-5 if self.method == "Full" else 1e-4,
                "precision": "BF16",
                "gradientCheckpointing": self.checkpointing,
                "optimizer": {"type": self.optimizer},
            },
            "distributed": {"processesPerNode": 1, "strategy": {"type": self.strategy}},
            "resources": {"accelerator": {"count": 1}},
        }


CASES = [
    Case("8b-lora", "8b", "LoRA", 4096, 1, accumulation=4),
    Case("8b-lora-x2", "8b", "LoRA", 4096, 2),
    Case("8b-lora-checkpointed", "8b", "LoRA", 4096, 2, "Full"),
    Case("8b-qlora", "8b", "QLoRA", 4096, 2),
    Case("8b-qlora-checkpointed", "8b", "QLoRA", 4096, 2, "Full"),
    Case("8b-qlora-small", "8b", "QLoRA", 2048, 2, "Full", "PagedAdamW8bit", accumulation=1),
    Case("8b-lora-fsdp", "8b", "LoRA", 4096, 2, strategy="FSDP"),
    Case("3b-full", "3b", "Full", 4096, 4),
    Case("3b-full-fsdp", "3b", "Full", 4096, 4, strategy="FSDP"),
    Case("1b-full", "1b", "Full", 4096, 4, bare=True),
]


@dataclass(frozen=True)
class Figures:
    """What one case measured; bytes are the CUDA allocator's, loading included."""

    case: Case
    tokens_per_second: float
    utilization: float
    peak_bytes: int
    reserved_bytes: int
    step_seconds: float
    load_seconds: float
    overhead: float | None

    def line(self) -> str:
        bare = "" if self.overhead is None else f"  over a bare loop {self.overhead:+.2%}"
        return (
            f"{self.case.name:24} {self.tokens_per_second:9,.0f} tokens/s  MFU {self.utilization:6.1%}  "
            f"peak {self.peak_bytes / 2**30:6.2f} GiB (reserved {self.reserved_bytes / 2**30:6.2f})  "
            f"step {self.step_seconds:6.3f} s  loaded in {self.load_seconds:5.1f} s{bare}"
        )


class Bench:
    """One rank, models made once."""

    def __init__(self, directory: Path) -> None:
        self.context: RankContext = join("cuda")
        self.directory = directory
        torch.backends.cuda.matmul.allow_tf32 = False

    def model(self, shape: str) -> Path:
        directory = self.directory / shape
        if not directory.exists():
            started = time.monotonic()
            write_model(directory, SHAPES[shape], self.context.device)
            print(f"{shape}: weights written in {time.monotonic() - started:.1f} s", flush=True)
        return directory

    def start(self, case: Case, steps: int) -> tuple[Run, float]:
        """A run that is loaded and checked, and how long loading took."""
        shape: Shape = SHAPES[case.shape]
        rows = [[case.row]] * (case.micro * case.accumulation * 2)
        data = write_data(self.directory / f"{case.name}-data", rows, shape.vocab_size, validation_rows=0)
        config = worker_config(case.name, self.model(case.shape), data, self.directory / "work", case.values(steps))
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        heartbeat = HeartbeatWriter(Path(config.trainer.work_directory), 0, 0)
        run = Run(config, self.context, heartbeat, StopSignal())
        run.load()
        torch.cuda.synchronize()
        loaded = time.monotonic() - started
        run.check_and_measure_base()
        return run, loaded

    def measure(self, case: Case, steps: int, profile: bool) -> Figures:
        """Load, warm up, measure ``steps`` steps, free everything."""
        run, loaded = self.start(case, WARM_UP + steps + int(profile))
        bare: list[float] = []
        for number in range(WARM_UP + steps):
            run.step()
            if case.bare:
                bare.append(_timed(run, number))
        records = run.state.steps[WARM_UP : WARM_UP + steps]
        seconds = sum(record.seconds for record in records)
        tokens = sum(record.tokens for record in records)
        flops = run.flops.step(tokens * case.row, tokens)
        figures = Figures(
            case=case,
            tokens_per_second=tokens / seconds,
            utilization=flops / seconds / (run.peak_flops or float("nan")),
            peak_bytes=torch.cuda.max_memory_allocated(),
            reserved_bytes=torch.cuda.max_memory_reserved(),
            step_seconds=median(record.seconds for record in records),
            load_seconds=loaded,
            overhead=seconds / sum(bare[WARM_UP:]) - 1.0 if bare else None,
        )
        print(figures.line(), flush=True)
        if profile:
            _profile(run)
        del run
        gc.collect()
        torch.cuda.empty_cache()
        return figures


def _timed(run: Run, step: int) -> float:
    """Seconds of the least that trains on the rows of ``step``: forward, backward, clip, update."""
    torch.cuda.synchronize()
    started = time.monotonic()
    rows = run.stream.batch(step)
    supervised = int(run.data.train.supervised[rows].sum())
    for indices in deal(rows, run.data.train.lengths, 1, run.plan.micro_batch_size)[0]:
        batch = to_device(collate([run.data.train[int(index)] for index in indices]), run.context.device)
        with run.engine.autocast():
            output = run.loaded.module(batch)
        (output.loss / supervised).backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in run.engine.trainable()], 1.0)
    run.engine.optimizer.step()
    run.engine.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.monotonic() - started


def _profile(run: Run) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run.step()
        torch.cuda.synchronize()
    table = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in table)
    print(f"  busy {total / 1e3:.1f} ms of {run.state.steps[-1].seconds * 1e3:.1f} ms")
    for event in table[:28]:
        share = event.self_device_time_total / total
        print(f"  {share:6.1%} {event.self_device_time_total / 1e3:8.2f} ms {event.count:6} x {event.key[:110]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="default: all cases")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each case")
    parser.add_argument("--profile", action="append", default=[], help="cases whose kernels are listed")
    parser.add_argument("--directory", type=Path, default=None, help="default: a new temporary directory")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the launcher sets it
    bench = Bench(options.directory or Path(tempfile.mkdtemp(prefix="gpu-bench-")))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    failed = 0
    figures = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        try:
            figures.append(bench.measure(case, options.steps, case.name in options.profile))
        except Exception as error:
            print(f"{case.name:24} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
            failed += 1
            gc.collect()
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in figures], indent=1))
    sys.stdout.flush()
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    sys.exit(main())
