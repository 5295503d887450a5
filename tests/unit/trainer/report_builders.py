"""Builds reports of any length for the tests of report.html."""

from __future__ import annotations

import math
import random
from typing import Any

from finetune_api.plan import CheckpointingMode, Decision, MemoryEstimate, ParameterCounts, Plan, ResolvedStrategy
from finetune_api.report import EvaluationRecord, Report, SampleRecord, StepRecord
from finetune_api.spec import MethodType, OutputFormat, Precision, Sharding, StrategyType


def make_plan(steps: int) -> Plan:
    return Plan(
        world_size=2,
        nodes=1,
        processes_per_node=2,
        device="cpu",
        strategy=ResolvedStrategy(type=StrategyType.FSDP, label="FSDP full shard", sharding=Sharding.FULL),
        method=MethodType.QLORA,
        precision=Precision.BF16,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        global_batch_size=16,
        gradient_checkpointing=CheckpointingMode.NONE,
        total_steps=steps,
        steps_per_epoch=max(1, steps // 3),
        warmup_steps=max(1, steps // 30),
        parameters=ParameterCounts(total=6_557_952, trainable=212_992, quantized=4_194_304, exact=True),
        memory_per_device=MemoryEstimate(
            weights=13_631_488,
            gradients=851_968,
            optimizer=1_703_936,
            activations=96_468_992,
            logits=33_554_432,
            total=146_210_816,
        ),
        output_format=OutputFormat.ADAPTER,
        artifact_prefix="s3://adapters/support/default/stdlib-answers/5f1c2a/",
        checkpoint_prefix="s3://adapters/support/default/stdlib-answers/5f1c2a/checkpoints/",
        decisions=(
            Decision(
                field="training.microBatchSize", value="4", reason="the largest divisor of 16 / 2 ranks that fits 2 GiB"
            ),
            Decision(
                field="training.gradientCheckpointing", value="None", reason="activations fit without recomputation"
            ),
        ),
        warnings=("resources.accelerator is absent: this job trains on the CPU.",),
    )


def make_steps(count: int) -> tuple[StepRecord, ...]:
    noise = random.Random(7)
    return tuple(
        StepRecord(
            step=step,
            loss=2.0 + 4.0 * math.exp(-step / (0.2 * count + 1)) + noise.gauss(0, 0.12),
            learning_rate=2e-4
            * min(1.0, step / max(1, count // 30))
            * (0.5 + 0.5 * math.cos(math.pi * step / (count + 1))),
            gradient_norm=abs(noise.gauss(0.9, 0.2)) + (6.0 if step == count // 2 else 0.0),
            tokens=8_192 + noise.randrange(-400, 400),
            supervised_tokens=3_100,
            seconds=1.6 + abs(noise.gauss(0, 0.1)),
            memory_bytes=812_000_000 + min(step, 12) * 9_000_000,
        )
        for step in range(1, count + 1)
    )


def make_evaluations(steps: int) -> tuple[EvaluationRecord, ...]:
    at = sorted({0, *(round(steps * part / 6) for part in range(1, 7))})
    return tuple(
        EvaluationRecord(
            step=step,
            loss=2.15 + 4.0 * math.exp(-step / (0.2 * steps + 1)),
            token_accuracy=0.62 - 0.5 * math.exp(-step / (0.2 * steps + 1)),
            supervised_tokens=41_200,
            seconds=3.4,
        )
        for step in at
    )


def make_report(steps: int = 240, **changes: Any) -> Report:
    """A report of a QLoRA job with ``steps`` steps; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "job": {"namespace": "default", "name": "stdlib-answers", "uid": "5f1c2a"},
        "plan": make_plan(steps),
        "spec": {
            "model": {"uri": "file:///models/stdlib-base"},
            "dataset": {"train": [{"uri": "file:///data/train.jsonl", "format": "Messages"}], "packing": True},
            "method": {"type": "QLoRA", "lora": {"rank": 16, "targetModules": ["all-linear"]}},
        },
        "environment": {"python": "3.11.2", "torch": "2.15.0", "peft": "0.21.0", "host": "2 x AMD EPYC, 23 GiB"},
        "dataset": {
            "trainSamples": 4_120,
            "trainTokens": 512_004,
            "maskedTokenShare": 0.613,
            "dropped": {"tooLong": 12},
        },
        "self_check": (
            {
                "rank": 0,
                "device": "cpu",
                "precision": "BF16",
                "quantizedBytes": 1_048_576,
                "trainableParameters": 106_496,
            },
            {
                "rank": 1,
                "device": "cpu",
                "precision": "BF16",
                "quantizedBytes": 1_048_000,
                "trainableParameters": 106_496,
            },
        ),
        "steps": make_steps(steps),
        "evaluations": make_evaluations(steps),
        "samples": (
            SampleRecord(
                prompt="What does json.dumps do?",
                reference="Serialize obj to a JSON formatted str.",
                before="the the of module is a\n\n    def __init__(self",
                after="Serialize obj to a JSON formatted str.",
            ),
        ),
        "attempts": (
            {"number": 1, "resumedFromStep": None},
            {
                "number": 2,
                "resumedFromStep": steps // 2,
                "skipped": ["step-00000140: model.safetensors has a wrong sha256"],
            },
        ),
        "metrics": {"trainLoss": 2.01, "validationLoss": 2.18, "tokensPerSecond": 5012.0},
        "artifact": {
            "uri": "s3://adapters/support/default/stdlib-answers/5f1c2a/",
            "manifestSha256": "8f" * 32,
            "files": [
                {"path": "adapter_model.safetensors", "bytes": 852_984, "sha256": "3a" * 32},
                {"path": "adapter_config.json", "bytes": 901, "sha256": "b7" * 32},
            ],
        },
        "started_at": "2026-03-02T09:10:11+00:00",
        "finished_at": "2026-03-02T09:17:31+00:00",
        "seconds": 440.2,
    }
    return Report(**(fields | changes))
