"""Combinations that cannot work: the reason, and the nearest that can.

An ordered tuple of small questions to a resolved strategy. Rules over the manifest alone stand in ``validation.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune_api.errors import Problem
from finetune_api.introspect import Path
from finetune_api.plan import ModelFacts, ResolvedStrategy
from finetune_api.rules import Rule, ask
from finetune_api.spec import (
    FineTuneJobSpec,
    GradientCheckpointing,
    MethodType,
    Offload,
    OptimizerType,
    OutputFormat,
    Precision,
    StrategyType,
)

EIGHT_BIT = frozenset({OptimizerType.ADAMW_8BIT, OptimizerType.PAGED_ADAMW_8BIT})
REPLICATED_ONLY = EIGHT_BIT | {OptimizerType.ADAFACTOR}


@dataclass(frozen=True)
class Combination:
    """What the rules judge."""

    spec: FineTuneJobSpec
    strategy: ResolvedStrategy
    device: str
    world_size: int
    model: ModelFacts | None


def _eight_bit_on_cpu(c: Combination) -> Iterator[Problem]:
    kind = c.spec.training.optimizer.type
    if kind in EIGHT_BIT and c.device == "cpu":
        yield Problem(
            "spec.training.optimizer.type",
            kind.value,
            "8-bit optimizers have CUDA kernels only and this job trains on CPU",
            "use AdamW, or ask for resources.accelerator",
        )


def _optimizer_under_sharding(c: Combination) -> Iterator[Problem]:
    kind = c.spec.training.optimizer.type
    if c.strategy.type is StrategyType.DDP or kind not in REPLICATED_ONLY:
        return
    if kind in EIGHT_BIT and c.device == "cpu":
        return  # told already
    reason = "quantises blocks of whole tensors" if kind in EIGHT_BIT else "needs row and column means of whole tensors"
    yield Problem(
        "spec.training.optimizer.type",
        kind.value,
        f"{reason} and cannot run on the shards of {c.strategy.label}",
        "use AdamW, or distributed.strategy.type DDP",
    )


def _half_precision_on_cpu(c: Combination) -> Iterator[Problem]:
    precision = c.spec.training.precision
    if precision is Precision.FP16 and c.device == "cpu":
        yield Problem(
            "spec.training.precision",
            precision.value,
            "FP16 training with loss scaling needs a CUDA device",
            "use BF16 (or FP32) on CPU, or ask for resources.accelerator",
        )


def _quantized_experts(c: Combination) -> Iterator[Problem]:
    if c.spec.method.type is MethodType.QLORA and c.model is not None and c.model.experts:
        yield Problem(
            "spec.method.type",
            c.spec.method.type.value,
            f"{c.model.architecture} has {c.model.experts} fused experts per layer, which 4-bit storage does not reach",
            "use LoRA with FSDP, which shards them",
        )


def _output_of_full(c: Combination) -> Iterator[Problem]:
    kind, full = c.spec.output.format, c.spec.method.type is MethodType.FULL
    if full and kind in {OutputFormat.ADAPTER, OutputFormat.MERGED_MODEL}:
        yield Problem(
            "spec.output.format",
            kind.value,
            "method Full trains the model itself, so there is no adapter to publish or merge",
            "use FullModel or leave it out",
        )
    if not full and kind is OutputFormat.FULL_MODEL:
        yield Problem(
            "spec.output.format",
            kind.value,
            f"method {c.spec.method.type.value} trains an adapter, not the whole model",
            "use Adapter, or MergedModel for a model with the adapter merged in",
        )


def _parameter_offload_stage(c: Combination) -> Iterator[Problem]:
    strategy = c.strategy
    if strategy.offload_parameters is not Offload.NONE and strategy.zero_stage != 3:
        yield Problem(
            "spec.distributed.strategy.deepspeed.offloadParameters",
            strategy.offload_parameters.value,
            f"parameters are only sharded, and so only offloaded, by ZeRO stage 3, not stage {strategy.zero_stage}",
            "set zeroStage to 3, or offloadOptimizer instead",
        )


def _nvme_offload(c: Combination) -> Iterator[Problem]:
    members = (
        ("offloadOptimizer", c.strategy.offload_optimizer),
        ("offloadParameters", c.strategy.offload_parameters),
    )
    for name, offload in members:
        path = f"spec.distributed.strategy.deepspeed.{name}"
        if offload is not Offload.NVME:
            continue
        if c.strategy.zero_stage != 3:
            yield Problem(path, offload.value, "only ZeRO stage 3 offloads to NVMe", "set zeroStage to 3, or use CPU")
        if c.spec.resources.scratch is None:
            yield Problem(
                path,
                offload.value,
                "offloading to NVMe needs local disk and resources.scratch is absent",
                "set resources.scratch, or use CPU",
            )


def _selective_recomputation(c: Combination) -> Iterator[Problem]:
    mode = c.spec.training.gradient_checkpointing
    if mode is GradientCheckpointing.SELECTIVE and c.strategy.zero_stage == 3:
        yield Problem(
            "spec.training.gradientCheckpointing",
            mode.value,
            "ZeRO stage 3 gathers weights inside the recomputed layers, which selective recomputation cannot replay",
            "use Full, or distributed.strategy.type FSDP",
        )


_METHOD = ("method.type",)
_OPTIMIZER = ("training.optimizer.type",)
_STRATEGY = ("distributed.strategy", "distributed.nodes", "distributed.processesPerNode", "resources.accelerator")

COMBINATION_RULES: tuple[Rule[Combination], ...] = (
    Rule((*_OPTIMIZER, "resources.accelerator"), _eight_bit_on_cpu),
    Rule((*_OPTIMIZER, *_STRATEGY), _optimizer_under_sharding),
    Rule(("training.precision", "resources.accelerator"), _half_precision_on_cpu),
    Rule(_METHOD, _quantized_experts),
    Rule((*_METHOD, "output.format"), _output_of_full),
    Rule(_STRATEGY, _parameter_offload_stage),
    Rule(("training.gradientCheckpointing", *_STRATEGY), _selective_recomputation),
    Rule((*_STRATEGY, "resources.scratch"), _nvme_offload),
)


def combination_problems(combination: Combination, broken: Iterable[Path] = ()) -> Iterator[Problem]:
    """Everything that forbids this combination, judged by the fields that are not ``broken``."""
    return ask(COMBINATION_RULES, combination, broken)
