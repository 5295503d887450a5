"""``strategy.deepspeed.configuration``: the settings of DeepSpeed that a job may tune, and nothing else.

Batch sizes, precision, the ZeRO stage and offload devices are the plan's: two places for one number would disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import Problem
from finetune_api.names import nearest

PATH = "spec.distributed.strategy.deepspeed.configuration"
_DTYPES = ("fp16", "bf16", "fp32")
_OWNED = {
    "train_batch_size": "training.globalBatchSize",
    "train_micro_batch_size_per_gpu": "training.microBatchSize",
    "gradient_accumulation_steps": "training.globalBatchSize and microBatchSize",
    "gradient_clipping": "training.maxGradientNorm",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "zero_optimization.stage": "distributed.strategy.deepspeed.zeroStage",
    "zero_optimization.offload_optimizer": "distributed.strategy.deepspeed.offloadOptimizer",
    "zero_optimization.offload_param": "distributed.strategy.deepspeed.offloadParameters",
    "activation_checkpointing": "training.gradientCheckpointing",
}


@dataclass(frozen=True)
class _Setting:
    kind: type
    minimum: int = 0
    maximum: int = 10**12
    choices: tuple[str, ...] = ()


_SIZE = _Setting(int, 1)
_SWITCH = _Setting(bool)
SETTINGS: dict[str, _Setting] = {
    "communication_data_type": _Setting(str, choices=_DTYPES),
    "wall_clock_breakdown": _SWITCH,
    "zero_optimization.allgather_partitions": _SWITCH,
    "zero_optimization.allgather_bucket_size": _SIZE,
    "zero_optimization.reduce_bucket_size": _SIZE,
    "zero_optimization.reduce_scatter": _SWITCH,
    "zero_optimization.overlap_comm": _SWITCH,
    "zero_optimization.contiguous_gradients": _SWITCH,
    "zero_optimization.round_robin_gradients": _SWITCH,
    "zero_optimization.sub_group_size": _SIZE,
    "zero_optimization.stage3_prefetch_bucket_size": _Setting(int),
    "zero_optimization.stage3_param_persistence_threshold": _Setting(int),
    "zero_optimization.stage3_max_live_parameters": _Setting(int),
    "zero_optimization.stage3_max_reuse_distance": _Setting(int),
}


def configuration_problems(configuration: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that are not on the list, and values of the wrong kind."""
    for name, value in _flat(configuration):
        path = f"{PATH}.{name}"
        setting = SETTINGS.get(name)
        if setting is not None:
            yield from _value_problems(path, value, setting)
            continue
        owner = _OWNED.get(name) or _OWNED.get(name.partition(".")[0])
        if owner:
            yield Problem(path, None, "is decided by the plan", f"set spec.{owner} instead")
            continue
        guess = nearest(name, SETTINGS)
        remedy = f"did you mean {guess}?" if guess else f"remove it; known here are {', '.join(SETTINGS)}"
        yield Problem(path, None, "is not a setting that a job may pass on", remedy)


def configuration_schema() -> dict[str, Any]:
    """The same list as JSON Schema, for editors and for the API server."""
    top: dict[str, Any] = {}
    zero: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        block, dot, member = name.rpartition(".")
        (zero if dot else top)[member if dot else name] = _setting_schema(setting)
        assert block in {"", "zero_optimization"}
    block_schema = {"type": "object", "additionalProperties": False, "properties": zero}
    return {"type": "object", "additionalProperties": False, "properties": {**top, "zero_optimization": block_schema}}


def _setting_schema(setting: _Setting) -> dict[str, Any]:
    if setting.kind is bool:
        return {"type": "boolean"}
    if setting.kind is str:
        return {"type": "string", "enum": list(setting.choices)}
    return {"type": "integer", "minimum": setting.minimum, "maximum": setting.maximum}


def _flat(configuration: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings by dotted name; only ``zero_optimization`` is looked into."""
    for name, value in configuration.items():
        if name != "zero_optimization":
            yield (f"'{name}'" if "." in name else name), value  # a dotted name is no way into the block
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", member) for key, member in value.items())
        else:
            yield f"{name}.", value


def _value_problems(path: str, value: Any, setting: _Setting) -> Iterator[Problem]:
    if setting.kind is bool:
        if not isinstance(value, bool):
            yield Problem(path, value, "must be true or false", "write true or false without quotes")
    elif setting.kind is str:
        if value not in setting.choices:
            yield Problem(path, value, f"must be one of {', '.join(setting.choices)}", "use one of them")
    elif isinstance(value, bool) or not isinstance(value, int):
        yield Problem(path, value, "must be a whole number", "write a number without quotes")
    elif not setting.minimum <= value <= setting.maximum:
        yield Problem(
            path, value, f"must be from {setting.minimum:g} to {setting.maximum:g}", "use a number in this range"
        )
