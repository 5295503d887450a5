"""Rules over several fields in the words of JSON Schema, so that an editor underlines them while they are typed.

The same rules stand in ``spec_rules.py`` (Python) and ``cel.py`` (API server). What JSON Schema cannot say is listed
in ``INEXPRESSIBLE``: it compares no two fields, does no arithmetic, and does not know where a job will run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from finetune_api.parameters import ALL_LINEAR
from finetune_api.spec import OptimizerType, Schedule, ScheduleType
from finetune_api.spec_rules import SCHEDULE_FIELDS, SINGLE_FILES, UNREADABLE

Fragment = dict[str, Any]

INEXPRESSIBLE: tuple[str, ...] = (
    "globalBatchSize is a multiple of the ranks, microBatchSize divides a rank's share: arithmetic",
    "processesPerNode equals accelerator.count: two fields compared",
    "warmupSteps is at most maxSteps: two fields compared",
    "requests are at most limits: two fields compared",
    "modulesToSave and targetModules share no name: two fields compared",
    "no source is listed twice, validation is not training data: items compared by one field",
    "file:// is refused in a cluster: the same manifest is valid for 'finetune run'",
)


def _given(path: str, *, equals: Any = None, one_of: Iterable[Any] = (), unlike: Any = None) -> Fragment:
    """The field at ``path`` (below this block) is present, and has this value, one of these, or another than this."""
    *blocks, name = path.split(".")
    value: Fragment = {}
    if equals is not None:
        value = {"const": equals}
    elif one_of:
        value = {"enum": list(one_of)}
    elif unlike is not None:
        value = {"not": {"const": unlike}}
    fragment: Fragment = {"required": [name], **({"properties": {name: value}} if value else {})}
    for block in reversed(blocks):
        fragment = {"required": [block], "properties": {block: fragment}}
    return fragment


def _implies(condition: Fragment, consequence: Fragment) -> Fragment:
    return {"if": condition, "then": consequence}


def _never(*conditions: Fragment) -> Fragment:
    """Not all of these at once."""
    return {"not": {"allOf": list(conditions)}}


def _either_of(*conditions: Fragment) -> Fragment:
    return {"anyOf": list(conditions)}


def _ends(suffixes: Iterable[str], *, any_case: bool = False) -> str:
    """A pattern for texts with one of the endings."""
    words = [re.escape(suffix) for suffix in suffixes]
    if any_case:
        words = ["".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in word) for word in words]
    return f"({'|'.join(words)})$"


def _uri(pattern: str) -> Fragment:
    return {"required": ["uri"], "properties": {"uri": {"type": "string", "pattern": pattern}}}


def _schedule_member(name: str, alias: str, types: frozenset[ScheduleType]) -> Fragment:
    default = Schedule.model_fields[name].default
    condition = _given(alias, unlike=default)
    allowed: Fragment = {"properties": {"type": {"enum": [kind.value for kind in ScheduleType if kind in types]}}}
    return _implies(condition, allowed if ScheduleType.COSINE in types else {**allowed, "required": ["type"]})


_NO_OPTIONS = _uri("^(file|pvc)://")
_LOCATION: tuple[Fragment, ...] = (
    _never(_uri("^[a-z0-9]+://+$")),
    _never(_uri(r"^(s3|gs|az|pvc)://(.*/)?\.{1,2}(/.*)?$")),
    _never(_given("credentials"), _NO_OPTIONS),
    _never(_given("endpoint"), _NO_OPTIONS),
    _implies(_either_of(_given("region"), _given("pathStyle")), _uri("^s3://")),
)
_SOURCE = (*_LOCATION, _never(_uri(_ends(UNREADABLE, any_case=True))))
_EIGHT_BIT = (OptimizerType.ADAMW_8BIT.value, OptimizerType.PAGED_ADAMW_8BIT.value)
_ADAM = (OptimizerType.ADAMW.value, *_EIGHT_BIT)
_ON_CPU = {"not": _given("resources.accelerator")}
_FULL = _given("method.type", equals="Full")
_DEEPSPEED = "distributed.strategy.deepspeed"
_HAS_VALIDATION = _given("dataset.validation")
_STAGE_3 = _given("zeroStage", equals=3)

CONDITIONS: dict[str, tuple[Fragment, ...]] = {
    "spec": (
        _never(_FULL, _given("output.format", one_of=("Adapter", "MergedModel"))),
        _implies(_given("output.format", equals="FullModel"), _FULL),
        _never(_ON_CPU, _given("training.optimizer.type", one_of=_EIGHT_BIT)),
        _never(_ON_CPU, _given("training.precision", equals="FP16")),
        _never(
            _given("training.optimizer.type", one_of=(*_EIGHT_BIT, OptimizerType.ADAFACTOR.value)),
            _given("distributed.strategy.type", one_of=("FSDP", "DeepSpeed")),
        ),
        _implies(_given("training.evaluateEverySteps"), _HAS_VALIDATION),
        _implies(_given("training.earlyStopping"), _HAS_VALIDATION),
        _never(
            _given("training.gradientCheckpointing", equals="Selective"),
            _given("distributed.strategy.type", equals="DeepSpeed"),
            _given(f"{_DEEPSPEED}.zeroStage", equals=3),
        ),
        _implies(
            _either_of(
                _given(f"{_DEEPSPEED}.offloadOptimizer", equals="NVMe"),
                _given(f"{_DEEPSPEED}.offloadParameters", equals="NVMe"),
            ),
            _given("resources.scratch"),
        ),
    ),
    "spec.model": (
        *_LOCATION,
        _never(_uri(_ends(SINGLE_FILES))),
        _never(_uri(r"\*")),
        _implies(_given("revision"), _uri("^hf://[^@]*$")),
        _implies(_uri("@"), _uri("^hf://")),
        _implies(_uri("^hf://"), _uri("^hf://[^/@]+/[^/@]+(@[0-9a-f]{40})?$")),
    ),
    "spec.dataset.train[]": _SOURCE,
    "spec.dataset.validation": (
        {"oneOf": [_given("fraction"), {"required": ["sources"], "properties": {"sources": {"minItems": 1}}}]},
    ),
    "spec.dataset.validation.sources[]": _SOURCE,
    "spec.output": (*_LOCATION, _never(_uri(r"\*"))),
    "spec.method": (
        _implies(_given("lora"), _given("type", one_of=("LoRA", "QLoRA"))),
        _implies(_given("quantization"), _given("type", equals="QLoRA")),
    ),
    "spec.method.lora": (
        {"properties": {"targetModules": {"uniqueItems": True}, "modulesToSave": {"uniqueItems": True}}},
        {
            "properties": {
                "targetModules": _implies({"contains": {"const": ALL_LINEAR}}, {"maxItems": 1}),
                "modulesToSave": {"not": {"contains": {"const": ALL_LINEAR}}},
            }
        },
    ),
    "spec.training": (
        _never(_given("epochs"), _given("maxSteps")),
        _implies(_given("earlyStopping"), _given("evaluateEverySteps")),
    ),
    "spec.training.schedule": (
        _never(_given("warmupFraction"), _given("warmupSteps")),
        *(_schedule_member(*field) for field in SCHEDULE_FIELDS),
    ),
    "spec.training.optimizer": (
        _implies(_given("momentum", unlike=0.0), _given("type", equals="SGD")),
        *(
            _implies(_given(name, unlike=default), {"properties": {"type": {"enum": list(_ADAM)}}})
            for name, default in (("beta1", 0.9), ("beta2", 0.999))
        ),
    ),
    "spec.distributed.strategy": (
        _implies(_given("fsdp"), _given("type", equals="FSDP")),
        _implies(_given("deepspeed"), _given("type", equals="DeepSpeed")),
    ),
    "spec.distributed.strategy.deepspeed": (
        _implies(_given("offloadParameters", one_of=("CPU", "NVMe")), _STAGE_3),
        _implies(_given("offloadOptimizer", equals="NVMe"), _STAGE_3),
    ),
    "spec.placement.tolerations[]": (
        _never(_given("operator", equals="Exists"), _given("value", unlike="")),
        _implies(_given("tolerationSeconds"), _given("effect", equals="NoExecute")),
    ),
}


def with_conditions(node: Fragment, path: str) -> Fragment:
    """The schema of one block (and all below it) with its rules as ``allOf``."""
    result = dict(node)
    if "properties" in node:
        result["properties"] = {n: with_conditions(m, f"{path}.{n}") for n, m in node["properties"].items()}
    if isinstance(node.get("items"), dict):
        result["items"] = with_conditions(node["items"], f"{path}[]")
    if path in CONDITIONS:
        result["allOf"] = [dict(condition) for condition in CONDITIONS[path]]
    return result
