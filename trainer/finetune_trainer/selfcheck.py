"""Step-0 self-check: what really runs, on every rank, compared with the plan. Nothing is silently downgraded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finetune_api.errors import SelfCheckError
from finetune_api.plan import Plan
from finetune_api.spec import MethodType, Precision, StrategyType
from finetune_trainer import attention
from finetune_trainer.checkpoint import full_numel
from finetune_trainer.data import Batch, PreparedData, Sample, collate
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine
from finetune_trainer.evaluation import to_device
from finetune_trainer.model import DTYPES, row_arguments
from finetune_trainer.tuners.base import is_packed

_ISOLATED_TOKENS = 64
_ISOLATION_TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 0.02, Precision.FP16: 0.005}  # experts round differently
_LOGIT_TOLERANCE = {Precision.FP32: 1e-3, Precision.BF16: 0.15, Precision.FP16: 0.05}


def inspect_rank(engine: Engine, data: PreparedData, context: RankContext, weights: str) -> dict[str, Any]:
    """Facts about this rank as it stands before the first step."""
    model: Any = engine.module.model
    parameters = list(model.named_parameters())
    trainable = [p for _, p in parameters if p.requires_grad]
    quantized = [m for m in model.modules() if is_packed(m)]
    compute = engine.compute_dtype
    tokens = int(data.train.lengths.sum())
    return {
        "rank": context.rank,
        "worldSize": context.world_size,
        "device": _device_name(context.device),
        "strategy": engine.plan.strategy.label,
        "computeType": _name(compute),
        "trainableType": _name(trainable[0].dtype),
        "attentionType": ", ".join(sorted({_name(dtype) for _, dtype in attention.computed_in})),
        "trainableParameters": sum(full_numel(p) for p in trainable),
        "trainableTensors": len(trainable),
        "quantizedLayers": len(quantized),
        "quantizedBytes": sum(layer.stored_bytes for layer in quantized),
        "quantizedBytesHere": sum(_bytes_here(p) for layer in quantized for p in (layer.weight, layer.weight_absmax)),
        "parameterBytesHere": sum(_bytes_here(p) for _, p in parameters),
        "attention": ", ".join(sorted({kernel for kernel, _ in attention.computed_in})),
        "loss": "fused linear cross entropy, chunked",
        "weights": weights,
        "maskedTokenShare": round(1.0 - int(data.train.supervised.sum()) / max(1, tokens), 6),
        "trainRows": len(data.train),
    }


def compare_with_plan(plan: Plan, facts: list[dict[str, Any]]) -> None:
    """Raises SelfCheckError naming the first rank and every difference."""
    differences = []
    for fact in facts:
        for what, actual, expected in _expectations(plan, fact):
            if actual != expected:
                differences.append(f"rank {fact['rank']}: {what} is {actual}, the plan says {expected}")
    if len({fact["trainableParameters"] for fact in facts}) != 1:
        differences.append("ranks disagree about the number of trainable parameters")
    if differences:
        raise SelfCheckError(
            "What really runs differs from the plan: " + "; ".join(differences[:8]) + ".",
            hint="This is a defect of the planner or the trainer; report it with the manifest.",
        )


def _expectations(plan: Plan, fact: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    checks: list[tuple[str, Any, Any]] = [
        ("world size", fact["worldSize"], plan.world_size),
        ("device kind", fact["device"].split(":")[0], plan.device),
        ("type of trainable parameters", fact["trainableType"], _trainable_type(plan)),
        ("type that attention computes in", fact["attentionType"], _name(DTYPES[plan.precision])),
        ("quantised base", fact["quantizedLayers"] > 0, plan.method is MethodType.QLORA),
    ]
    counts = plan.parameters
    if counts is not None and counts.exact:
        checks.append(("number of trainable parameters", fact["trainableParameters"], counts.trainable))
    return checks


def _trainable_type(plan: Plan) -> str:
    """DeepSpeed computes on 16-bit parameters and keeps fp32 masters; the others keep fp32 and cast for computing."""
    deepspeed = plan.strategy.type is StrategyType.DEEPSPEED
    return _name(DTYPES[plan.precision]) if deepspeed else "float32"


def check_gradients(engine: Engine, context: RankContext) -> None:
    """After the first backward pass: every trainable tensor has a gradient, on every rank."""
    missing = engine.missing_gradients()
    for rank, names in enumerate(context.gather(missing)):
        if names:
            raise SelfCheckError(
                f"rank {rank}: {len(names)} trainable tensors got no gradient in the first step, first '{names[0]}'.",
                hint="A trainable part of the model is not used by its forward pass; choose other targetModules.",
            )


def check_head(model: nn.Module, engine: Engine, batch: Batch, context: RankContext) -> None:
    """The loss path computes the model's own logits: compares the last token's with the architecture's forward.

    Catches architectures that transform logits in a way that the chunked loss does not know. Every engine runs our
    path (and so shows the type it computes in); the comparison needs plain tensors, so only DDP makes it.
    """
    attention.computed_in.clear()
    ours = engine.evaluate(batch, last_token=True)[-1]
    if engine.plan.strategy.type is not StrategyType.DDP:
        return
    model.eval()
    try:
        with torch.no_grad(), engine.autocast():
            output = model(
                **row_arguments(batch),
                logits_to_keep=1,
            )
    finally:
        model.train()
    difference = float((output.logits[0, -1].float() - ours).abs().max())
    if difference > _LOGIT_TOLERANCE[engine.plan.precision] * max(1.0, float(ours.abs().max())):
        raise SelfCheckError(
            f"rank {context.rank}: {type(model).__name__} turns hidden states into logits in a way that the chunked "
            f"loss does not know (difference {difference:.3g}).",
            hint="Choose another base model, or report this architecture.",
        )


def check_isolation(model: nn.Module, engine: Engine, data: PreparedData, device: torch.device) -> None:
    """Samples that share a row never see each other: the second one's logits do not change with the first one.

    Attention is told where samples begin. Layers that mix tokens in another way (convolutions, state spaces) are not,
    and nothing else would show it.
    """
    tokens = data.train[0].input_ids[:_ISOLATED_TOKENS]
    other = (tokens + 1) % (int(tokens.max()) + 1)
    rows = ([_sample(first), _sample(tokens)] for first in (tokens, other))
    same, changed = (engine.evaluate(to_device(collate(row), device), last_token=True)[-1] for row in rows)
    difference = float((same - changed).abs().max())
    if difference > _ISOLATION_TOLERANCE[engine.plan.precision] * max(1.0, float(same.abs().max())):
        raise SelfCheckError(
            f"In {type(model).__name__} a sample sees the one before it in its row (its logits differ by"
            f" {difference:.3g}): it has layers besides attention that mix tokens.",
            hint="Set training.microBatchSize to 1 and dataset.packing to false, or choose another base model.",
        )


def _sample(tokens: NDArray[np.int32]) -> Sample:
    labels = tokens.copy()
    labels[0] = -100
    return Sample(tokens, labels, np.array([len(tokens)], dtype=np.int32))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes_here(parameter: nn.Parameter) -> int:
    """Bytes that this rank really stores of a parameter."""
    if hasattr(parameter, "ds_tensor"):
        return int(parameter.ds_tensor.numel() * parameter.ds_tensor.element_size())
    local = getattr(parameter, "_local_tensor", parameter)
    return int(local.numel() * local.element_size())


def _device_name(device: torch.device) -> str:
    return f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
