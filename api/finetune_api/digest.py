"""What defines a result, and what a checkpoint depends on, as one number each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_api.batch import DEFAULT_EPOCHS, DEFAULT_WARMUP_FRACTION, SELF_RISING
from finetune_api.spec import (
    DeepSpeedOptions,
    FineTuneJobSpec,
    FsdpOptions,
    LoraOptions,
    MethodType,
    OutputFormat,
    QuantizationOptions,
    StrategyType,
)

_DEFINING = ("model", "dataset", "task", "method", "training", "distributed", "output")
_ACCESS = frozenset({"credentials", "region", "pathStyle"})  # how bytes are reached, not which


# These change how fast the same numbers are computed, never which.
_EXECUTION_ONLY = frozenset({"microBatchSize", "gradientCheckpointing"})


def result_digest(spec: FineTuneJobSpec) -> str:
    """sha256 (hex) of everything that defines the result: model, dataset, task, method, training, distributed, output.

    A field that is absent counts as its default, and how storage is reached (Secret names, region) does not count.
    """
    return _sha256(_content(spec))


def training_digest(spec: FineTuneJobSpec) -> str:
    """sha256 (hex) of what a checkpoint depends on: as ``result_digest``, less where it runs and where it goes.

    A checkpoint may therefore continue at another number of ranks, another engine or another micro-batch size.
    """
    content = _content(spec)
    training = {key: value for key, value in content["training"].items() if key not in _EXECUTION_ONLY}
    return _sha256({name: content[name] for name in ("model", "dataset", "task", "method")} | {"training": training})


def _content(spec: FineTuneJobSpec) -> dict[str, Any]:
    content = {name: _without_access(getattr(spec, name).model_dump(mode="json", by_alias=True)) for name in _DEFINING}
    content["method"] = _method(spec)
    content["training"] = _training(spec, content["training"])
    content["distributed"] = _distributed(spec)
    content["output"]["format"] = (spec.output.format or _default_format(spec)).value
    return content


def _sha256(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_access(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_access(value) for key, value in node.items() if key not in _ACCESS}
    return [_without_access(item) for item in node] if isinstance(node, list) else node


def _method(spec: FineTuneJobSpec) -> dict[str, Any]:
    method = spec.method
    content: dict[str, Any] = {"type": method.type.value}
    if method.type is not MethodType.FULL:
        content["lora"] = (method.lora or LoraOptions()).model_dump(mode="json", by_alias=True)
    if method.type is MethodType.QLORA:
        options = method.quantization or QuantizationOptions()
        computed = options.compute_type or spec.training.precision
        content["quantization"] = options.model_dump(mode="json", by_alias=True) | {"computeType": computed.value}
    return content


def _training(spec: FineTuneJobSpec, content: dict[str, Any]) -> dict[str, Any]:
    training = spec.training
    if training.epochs is None and training.max_steps is None:
        content["epochs"] = DEFAULT_EPOCHS
    schedule = training.schedule
    if schedule.type not in SELF_RISING and schedule.warmup_fraction is None and schedule.warmup_steps is None:
        content["schedule"]["warmupFraction"] = float(DEFAULT_WARMUP_FRACTION)
    return content


def _distributed(spec: FineTuneJobSpec) -> dict[str, Any]:
    distributed, accelerator = spec.distributed, spec.resources.accelerator
    strategy = distributed.strategy
    content: dict[str, Any] = {"type": strategy.type.value}
    if strategy.type is StrategyType.FSDP:
        content["fsdp"] = (strategy.fsdp or FsdpOptions()).model_dump(mode="json", by_alias=True)
    if strategy.type is StrategyType.DEEPSPEED:
        content["deepspeed"] = (strategy.deepspeed or DeepSpeedOptions()).model_dump(mode="json", by_alias=True)
    processes = distributed.processes_per_node or (accelerator.count if accelerator else 1)
    return {"nodes": distributed.nodes, "processesPerNode": processes, "strategy": content}


def _default_format(spec: FineTuneJobSpec) -> OutputFormat:
    return OutputFormat.FULL_MODEL if spec.method.type is MethodType.FULL else OutputFormat.ADAPTER
