"""``python -m bench.gpu_checks``: every method, precision and engine that one GPU can run, beside the CPU's curves.

Prints one line per check and exits with 1 when one failed.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests import builders

from bench.gpu_jobs import HEADS_64, HEADS_128, TINY, Shape, join, on, worker_config, write_data, write_model
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_storage.facts import read_facts
from finetune_trainer import attention
from finetune_trainer.progress import HeartbeatWriter, StopSignal
from finetune_trainer.recipe import Interrupted, train

STEPS = 6
ROWS = [[9, 14, 5], [30], [12, 12], [7, 21], [25, 3 + 4], [18], [11, 6, 8], [28]] * 3
METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "Full"},
    "lora": {"type": "LoRA"},
    "dora": {"type": "LoRA", "lora": {"useDora": True}},
    **{
        f"qlora-{kind.lower()}{'-double' if double else ''}": {
            "type": "QLoRA",
            "quantization": {"type": kind, "doubleQuantization": double},
        }
        for kind in ("NF4", "FP4")
        for double in (True, False)
    },
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "DDP"},
    "fsdp": {"type": "FSDP"},
    "offload": {"type": "FSDP", "fsdp": {"cpuOffload": True}},
}


class Checks:
    """One process group, one directory, one list of failures."""

    def __init__(self, directory: Path) -> None:
        self.context = join("cuda")
        self.directory = directory
        self.failed: list[str] = []
        self.count = 0
        cuda = torch.device("cuda", 0)
        self.models = {
            name: write_model(directory / name, shape, cuda)
            for name, shape in (("tiny", TINY), ("heads-64", HEADS_64), ("heads-128", HEADS_128))
        }
        self.data = write_data(directory / "data", ROWS, TINY.vocab_size, validation_rows=4)

    def check(self, name: str, question: Callable[[], str]) -> None:
        """Ask, and print the answer or what went wrong."""
        started = time.monotonic()
        try:
            text, verdict = question(), "ok  "
        except Exception as error:
            text, verdict = f"{type(error).__name__}: {str(error)[:300]}", "FAIL"
            self.failed.append(name)
            traceback.print_exc(limit=-6)
        print(f"{verdict} {name:46} {time.monotonic() - started:5.1f} s  {text}", flush=True)

    def curve(
        self, method: str, strategy: str, precision: str, device: str, model: str = "tiny", cut: int = 0, **more: Any
    ) -> list[float]:
        """The loss of each step of a whole job; ``cut`` interrupts it after that step and starts it again."""
        self.count += 1
        training = {"maxSteps": STEPS, "globalBatchSize": 8, "microBatchSize": 2, "learningRate": 3e-3}
        values: dict[str, Any] = {
            "method": METHODS[method],
            "training": {**training, "precision": precision, **more},
            "distributed": {"processesPerNode": 1, "strategy": STRATEGIES[strategy]},
        }
        if device == "cuda":
            values["resources"] = {"accelerator": {"count": 1}}
        config = worker_config(f"job-{self.count}", self.models[model], self.data, self.directory / "work", values)
        work = Path(config.trainer.work_directory)
        context = on(self.context, device)
        for attempt in range(2 if cut else 1):
            stop = _Stop()
            try:
                train(config, context, _Beat(work, stop, cut if attempt == 0 else 0), stop)
            except Interrupted:
                assert cut
        report = json.loads((work / "report" / "report.json").read_text())
        if cut:
            assert report["attempts"][-1]["resumedFromStep"] == cut, report["attempts"]
        gc.collect()
        torch.cuda.empty_cache()
        return [step["loss"] for step in report["steps"]]

    def close_to(self, expected: list[float], tolerance: float, **job: Any) -> str:
        """Run the job and compare its curve with ``expected``; the largest relative difference."""
        actual = self.curve(**job)
        difference = max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))
        text = f"{actual[0]:.4f} -> {actual[-1]:.4f}, largest relative difference {difference:.2e}"
        assert difference <= tolerance, f"{text} > {tolerance:g}"
        assert actual[-1] < actual[0], f"{text}: not learning"
        return text


class _Stop(StopSignal):
    """Asks to stop during one step, as SIGTERM would; installs no handler."""

    def __init__(self) -> None:
        self.requested = False
        self.requested_at = None


class _Beat(HeartbeatWriter):
    """Knows the step from what the recipe tells it."""

    def __init__(self, work: Path, stop: _Stop, cut: int) -> None:
        super().__init__(work, 0, 0)
        self.stop, self.cut = stop, cut

    def update(self, **fields: Any) -> None:
        super().update(**fields)
        if self.cut and fields.get("step") == self.cut - 1:
            self.stop.requested = True


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="gpu-checks-"))
    try:
        checks = Checks(directory)
        for section in (against_cpu, half_precision, checkpointing, eight_bit, resume, kernels, launched):
            section(checks)
        print(f"\n{len(checks.failed)} failed: {', '.join(checks.failed) or 'none'}", flush=True)
        sys.stdout.flush()
        os._exit(1 if checks.failed else 0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def against_cpu(checks: Checks) -> None:
    """FP32: the same curve on both devices, under every engine."""
    for method in METHODS:
        expected = checks.curve(method, "ddp", "FP32", "cpu")
        for strategy in STRATEGIES:
            job = {"method": method, "strategy": strategy, "precision": "FP32", "device": "cuda"}
            checks.check(
                f"{method} {strategy} FP32, cpu's curve", lambda e=expected, j=job: checks.close_to(e, 1e-3, **j)
            )


def half_precision(checks: Checks) -> None:
    """BF16 and FP16 near the FP32 curve, for three head sizes."""
    for model in checks.models:
        for method in METHODS if model == "tiny" else ("full", "lora", "qlora-nf4-double"):
            expected = checks.curve(method, "ddp", "FP32", "cuda", model)
            for precision, tolerance in (("BF16", 0.03), ("FP16", 0.01)):
                for strategy in STRATEGIES if model == "tiny" else ("ddp",):
                    job = {"method": method, "strategy": strategy, "precision": precision, "device": "cuda"}
                    checks.check(
                        f"{method} {strategy} {precision} {model}, FP32's curve",
                        lambda e=expected, j=job, t=tolerance, m=model: checks.close_to(e, t, **j, model=m),
                    )


def checkpointing(checks: Checks) -> None:
    """Recomputed activations give the curve of kept ones."""
    for method in ("full", "lora", "qlora-nf4-double"):
        for strategy in ("ddp", "fsdp"):
            job = {"method": method, "strategy": strategy, "precision": "BF16", "device": "cuda", "model": "heads-64"}
            expected = checks.curve(**job, gradientCheckpointing="None")
            for mode in ("Full", "Selective"):
                checks.check(
                    f"{method} {strategy} BF16 checkpointing {mode}",
                    lambda e=expected, j=job, m=mode: checks.close_to(e, 1e-3, **j, gradientCheckpointing=m),
                )


def eight_bit(checks: Checks) -> None:
    """8-bit optimizers near AdamW, and the same curve when interrupted and resumed."""
    for method in ("full", "lora", "qlora-nf4-double"):
        job = {"method": method, "strategy": "ddp", "precision": "BF16", "device": "cuda", "model": "heads-64"}
        adam = checks.curve(**job)
        for name in ("AdamW8bit", "PagedAdamW8bit"):
            optimizer = {"optimizer": {"type": name}}
            checks.check(
                f"{method} {name}, AdamW's curve", lambda j=job, o=optimizer, a=adam: checks.close_to(a, 0.05, **j, **o)
            )
            straight = checks.curve(**job, **optimizer)
            checks.check(
                f"{method} {name} resumed",
                lambda j=job, o=optimizer, s=straight: checks.close_to(s, 1e-6, **j, **o, cut=3),
            )


def resume(checks: Checks) -> None:
    """Interrupted at step 3 and resumed: the curve of a run in one piece."""
    for method, strategy, precision in (
        ("full", "ddp", "BF16"),
        ("full", "fsdp", "BF16"),
        ("full", "offload", "BF16"),
        ("lora", "ddp", "FP32"),
        ("lora", "fsdp", "BF16"),
        ("qlora-nf4-double", "ddp", "BF16"),
        ("qlora-nf4-double", "fsdp", "BF16"),
        ("full", "ddp", "FP16"),
    ):
        job = {"method": method, "strategy": strategy, "precision": precision, "device": "cuda", "model": "heads-64"}
        straight = checks.curve(**job)
        checks.check(
            f"{method} {strategy} {precision} resumed",
            lambda j=job, s=straight: checks.close_to(s, 1e-5, **j, cut=3),
        )


def kernels(checks: Checks) -> None:
    """The variable-length kernel beside one SDPA call per segment, forward and backward, in 16 bit."""
    for shape in (TINY, HEADS_64, HEADS_128):
        for window in (None, 40):
            for dtype in (torch.bfloat16, torch.float16):
                checks.check(
                    f"varlen head {shape.head_dim} window {window} {dtype}",
                    lambda s=shape, w=window, d=dtype: compare_attention(s, w, d),
                )


def launched(checks: Checks) -> None:
    """The whole way: ``python -m finetune_trainer`` prepares text, trains on the GPU and publishes."""
    for method in ("full", "lora", "qlora-nf4-double"):
        checks.check(f"launcher {method}", lambda m=method: launch(checks.directory / f"launch-{m}", m))


def launch(directory: Path, method: str) -> str:
    """One job from JSON lines to a published artifact."""
    model = builders.build_model(directory / "model")
    rows = builders.write_jsonl(directory / "train.jsonl", builders.conversations(64))
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": model.as_uri()},
            "dataset": {
                "train": [{"uri": rows.as_uri(), "format": "Messages"}],
                "validation": {"fraction": 0.1},
                "maxSequenceLength": 256,
            },
            "method": METHODS[method],
            "training": {"maxSteps": STEPS, "globalBatchSize": 4, "precision": "BF16"},
            "resources": {"accelerator": {"count": 1}},
            "output": {"uri": (directory / "output").as_uri()},
        }
    )
    job = JobIdentity(name="launched", uid=directory.name)
    config = TrainerConfig(
        job=job,
        spec=spec,
        plan=make_plan(spec, read_facts(spec), job),
        rendezvous=Rendezvous(endpoint="127.0.0.1:29613", minimum_nodes=1, maximum_nodes=1),
        work_directory=str(directory / "work"),
        cache_directory=str(directory / "cache"),
        metrics_port=0,
    )
    path = directory / "trainer.json"
    path.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "finetune_trainer", "--config", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    report = json.loads((directory / "work" / "report" / "report.json").read_text())
    checked = report["selfCheck"][0]
    assert checked["device"].startswith("cuda"), checked
    return f"{checked['device']}, {checked['attention']}, {len(report['steps'])} steps"


def compare_attention(shape: Shape, window: int | None, dtype: torch.dtype) -> str:
    """Relative differences of output and gradients from the per-segment reference in fp32."""
    torch.manual_seed(0)
    lengths = [70, 1, 200, 33]
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads)
    inputs = [torch.randn(1, h, sum(lengths), shape.head_dim, device="cuda", dtype=dtype) for h in heads]
    weight = torch.randn(1, sum(lengths), heads[0], shape.head_dim, device="cuda", dtype=dtype)

    def run(attend: Callable[..., torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(kind).detach().requires_grad_() for tensor in inputs]
        out = attend(*leaves, boundaries, max(lengths), None, window)
        return [out.detach(), *torch.autograd.grad((out * weight.to(kind)).sum(), leaves)]

    exact = run(attention._attend_per_segment, torch.float32)
    fast = run(attention._attend_varlen, dtype)
    errors = [float((f.float() - e).norm() / e.norm()) for f, e in zip(fast, exact, strict=True)]
    text = "output, dq, dk, dv: " + ", ".join(f"{error:.1e}" for error in errors)
    assert max(errors) < 1e-2, text
    return text


if __name__ == "__main__":
    sys.exit(main())
