"""Rules that the API server judges (CEL), with messages that name the field and the remedy.

The same rules in Python stand in ``spec_rules.py`` and ``compatibility.py``; tests hold both to the same manifests.
Every rule stands at the block that owns its fields, so that unset blocks cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_api.parameters import ALL_LINEAR
from finetune_api.spec import Schedule, ScheduleType
from finetune_api.spec_rules import SCHEDULE_FIELDS, SINGLE_FILES, UNREADABLE

IMMUTABLE_REQUIRED = ("model", "dataset", "method", "output")
IMMUTABLE_OPTIONAL = ("task", "training", "distributed")
CHANGED_WHILE_SUSPENDED = ("resources", "placement", "checkpoint")


def _rule(expression: str, message: str, path: str = "") -> dict[str, Any]:
    entry = {"rule": expression, "message": message}
    return {**entry, "fieldPath": path} if path else entry


def _frozen(name: str) -> dict[str, Any]:
    message = f"spec.{name} is immutable because it defines the result; create a new job with another name"
    if name in IMMUTABLE_REQUIRED:
        return _rule(f"self.{name} == oldSelf.{name}", message, f".{name}")
    absent = f"has(self.{name}) == has(oldSelf.{name})"
    return _rule(f"{absent} && (!has(self.{name}) || self.{name} == oldSelf.{name})", message)


def _kept_while_running(name: str) -> dict[str, Any]:
    """Pods and their configuration are made once: a change that no pod would hear of is refused."""
    new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
    same = f"has({new}) == has({old}) && (!has({new}) || {new} == {old})"
    suspended = "has(self.spec.runPolicy) && has(self.spec.runPolicy.suspend) && self.spec.runPolicy.suspend"
    podless = "!has(self.status) || !has(self.status.state) || self.status.state == 'Invalid'"
    return _rule(
        f"({same}) || ({suspended}) || {podless}",
        f"spec.{name} can change while the job is suspended only; set runPolicy.suspend: true, change it, then resume",
        ".spec",
    )


def _member(owner: str, member: str, types: tuple[str, ...], path: str) -> dict[str, Any]:
    """``member`` only where ``type`` is one of ``types``."""
    listed = ", ".join(f"'{kind}'" for kind in types)
    condition = f"!has(self.{member}) || (has(self.type) && self.type in [{listed}])"
    choice = " or ".join(types)
    return _rule(condition, f"spec.{path}.{member} belongs to {owner} {choice} only; remove it, or set type: {choice}")


def _not_file(expression: str, path: str) -> dict[str, Any]:
    return _rule(
        expression,
        f"{path}: file:// names nothing that all pods of a cluster share; use object storage or pvc://",
    )


def _quoted(words: Iterable[str]) -> str:
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


def _schedule_member(name: str, alias: str, types: frozenset[ScheduleType]) -> dict[str, Any]:
    """A field that only some schedules read; its default says nothing and is let through."""
    fitting = [kind.value for kind in ScheduleType if kind in types]
    default = Schedule.model_fields[name].default
    unset = f"!has(self.{alias})" + ("" if default is None else f" || self.{alias} == {default}")
    given = f"(has(self.type) ? self.type : '{ScheduleType.COSINE.value}')"
    known = f"use type {', '.join(fitting)}" if len(fitting) <= 2 else "or change type (see the reference)"
    message = f"spec.training.schedule.{alias} does not belong to this type of schedule; remove it, {known}"
    return _rule(f"{unset} || {given} in {_quoted(fitting)}", message.replace(", use", ", or use"))


def _at_most(name: str) -> dict[str, Any]:
    """A request within its limit; the pattern has made both quantities."""
    both = f"has(self.requests) && has(self.limits) && has(self.requests.{name}) && has(self.limits.{name})"
    return _rule(
        f"!({both}) || quantity(self.requests.{name}).compareTo(quantity(self.limits.{name})) <= 0",
        f"spec.resources.requests.{name} must be at most resources.limits.{name}; lower it, or raise the limit",
    )


def _offload(name: str) -> dict[str, Any]:
    return _rule(
        f"!has(self.{name}) || self.{name} != 'NVMe' || (has(self.zeroStage) && self.zeroStage == 3)",
        f"spec.distributed.strategy.deepspeed.{name}: only ZeRO stage 3 offloads to NVMe; set zeroStage: 3, or use CPU",
    )


def _once(block: str, name: str, key: str = "") -> dict[str, Any]:
    """No two items alike (in ``key``)."""
    left, right = (f"a.{key}", f"b.{key}") if key else ("a", "b")
    return _rule(
        f"!has(self.{name}) || self.{name}.all(a, self.{name}.exists_one(b, {left} == {right}))",
        f"{block}.{name} lists something twice; remove one of the two",
    )


def _readable(path: str) -> dict[str, Any]:
    return _rule(
        f"!{_quoted(UNREADABLE)}.exists(suffix, self.uri.lowerAscii().endsWith(suffix))",
        f"{path}: the uri is no format that can be read; use JSONL (plain, .gz, .zst), Parquet, Arrow or CSV",
    )


_LOCATION = (
    _rule("!self.uri.matches('^[a-z0-9]+://+$')", "uri: names nothing after its scheme; write scheme://bucket/path"),
    _rule(
        "self.uri.startsWith('hf://') || !self.uri.matches('^[a-z0-9]+://(.*/)?[.]{1,2}(/.*)?$')",
        "uri: contains '.' or '..'; write the path out",
    ),
    _rule(
        "!has(self.credentials) || !(self.uri.startsWith('file://') || self.uri.startsWith('pvc://'))",
        "credentials: file:// and pvc:// need no credentials; remove them",
    ),
    _rule(
        "!has(self.endpoint) || !(self.uri.startsWith('file://') || self.uri.startsWith('pvc://'))",
        "endpoint: file:// and pvc:// have no endpoint; remove it",
    ),
    _rule("!has(self.region) || self.uri.startsWith('s3://')", "region: only s3:// has a region; remove it"),
    _rule("!has(self.pathStyle) || self.uri.startsWith('s3://')", "pathStyle: only s3:// has a path style; remove it"),
)
_CPU = "!has(self.resources) || !has(self.resources.accelerator)"
_OPTIMIZER = "has(self.training) && has(self.training.optimizer) && has(self.training.optimizer.type)"
_NODES = "(has(self.distributed) && has(self.distributed.nodes) ? self.distributed.nodes : 1)"
_PROCESSES = (
    "(has(self.distributed) && has(self.distributed.processesPerNode) ? self.distributed.processesPerNode : "
    "(has(self.resources) && has(self.resources.accelerator) && has(self.resources.accelerator.count) ? "
    "self.resources.accelerator.count : 1))"
)
_RANKS = f"({_NODES} * {_PROCESSES})"
_BATCH = "(has(self.training) && has(self.training.globalBatchSize) ? self.training.globalBatchSize : 32)"
_STRATEGY = "has(self.distributed) && has(self.distributed.strategy) && has(self.distributed.strategy.type)"
_DEEPSPEED = f"{_STRATEGY} && self.distributed.strategy.type == 'DeepSpeed' && has(self.distributed.strategy.deepspeed)"
_OPTIONS = "self.distributed.strategy.deepspeed"
_STAGE_3 = f"has({_OPTIONS}.zeroStage) && {_OPTIONS}.zeroStage == 3"
_NVME = " || ".join(
    f"(has({_OPTIONS}.{name}) && {_OPTIONS}.{name} == 'NVMe')" for name in ("offloadOptimizer", "offloadParameters")
)

RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "": (
        _rule(
            "self.metadata.name.size() <= 50",
            "metadata.name must have at most 50 characters, because pods are named after the job; shorten it",
        ),
        _rule(
            "!self.metadata.name.contains('.')",
            "metadata.name must not contain '.', because pods are named after the job; use '-' instead",
        ),
        *(_kept_while_running(name) for name in CHANGED_WHILE_SUSPENDED),
    ),
    "spec": (
        *(_frozen(name) for name in (*IMMUTABLE_REQUIRED, *IMMUTABLE_OPTIONAL)),
        _rule(
            "self.method.type != 'Full' || !has(self.output.format) || self.output.format == 'FullModel'",
            "spec.output.format: method Full trains the model itself; use FullModel or leave it out",
        ),
        _rule(
            "self.method.type == 'Full' || !has(self.output.format) || self.output.format != 'FullModel'",
            "spec.output.format: this method trains an adapter, not the whole model; use Adapter or MergedModel",
        ),
        _rule(
            f"!({_CPU}) || !({_OPTIMIZER}) || !(self.training.optimizer.type in ['AdamW8bit', 'PagedAdamW8bit'])",
            "spec.training.optimizer.type: 8-bit optimizers need a CUDA device; use AdamW, or ask for "
            "resources.accelerator",
        ),
        _rule(
            f"!({_OPTIMIZER} && {_STRATEGY}) || !(self.distributed.strategy.type in ['FSDP', 'DeepSpeed']) || "
            "!(self.training.optimizer.type in ['AdamW8bit', 'PagedAdamW8bit', 'Adafactor'])",
            "spec.training.optimizer.type: this optimizer cannot run on shards; use AdamW, or "
            "distributed.strategy.type: DDP",
        ),
        _rule(
            f"!({_CPU}) || !has(self.training) || !has(self.training.precision) || self.training.precision != 'FP16'",
            "spec.training.precision: FP16 training needs a CUDA device; use BF16 (or FP32) on CPU",
        ),
        _rule(
            "!has(self.training) || !has(self.training.evaluateEverySteps) || has(self.dataset.validation)",
            "spec.training.evaluateEverySteps: there is no validation data; set dataset.validation, or remove it",
        ),
        _rule(
            "!has(self.training) || !has(self.training.earlyStopping) || has(self.dataset.validation)",
            "spec.training.earlyStopping: there is no validation data; set dataset.validation, or remove it",
        ),
        _rule(
            "!has(self.distributed) || !has(self.distributed.processesPerNode) || !has(self.resources) || "
            "!has(self.resources.accelerator) || self.distributed.processesPerNode == "
            "(has(self.resources.accelerator.count) ? self.resources.accelerator.count : 1)",
            "spec.distributed.processesPerNode must equal resources.accelerator.count; leave it out",
        ),
        _rule(
            f"{_BATCH} % {_RANKS} == 0",
            "spec.training.globalBatchSize must be a multiple of the ranks (nodes x processesPerNode); change either",
        ),
        _rule(
            f"!has(self.training) || !has(self.training.microBatchSize) || {_BATCH} % {_RANKS} != 0 || "
            f"{_BATCH} / {_RANKS} % self.training.microBatchSize == 0",
            "spec.training.microBatchSize must divide the samples per step of each rank (globalBatchSize / ranks); "
            "change either",
        ),
        _rule(
            f"!({_DEEPSPEED}) || !has(self.training) || !has(self.training.gradientCheckpointing) || "
            f"self.training.gradientCheckpointing != 'Selective' || !({_STAGE_3})",
            "spec.training.gradientCheckpointing: Selective cannot replay what ZeRO stage 3 gathers; use Full, or "
            "distributed.strategy.type: FSDP",
        ),
        _rule(
            f"!({_DEEPSPEED}) || !({_NVME}) || (has(self.resources) && has(self.resources.scratch))",
            "spec.distributed.strategy.deepspeed: NVMe offload needs local disk; set resources.scratch, or use CPU",
        ),
    ),
    "spec.model": (
        _rule(
            f"!self.uri.contains('*') && !{_quoted(SINGLE_FILES)}.exists(suffix, self.uri.endsWith(suffix))",
            "spec.model.uri names a file or pattern; name the directory with config.json and *.safetensors",
        ),
        *_LOCATION,
        _not_file("!self.uri.startsWith('file://')", "spec.model.uri"),
        _rule(
            "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[^/@]+/[^/@]+(@[0-9a-f]{40})?$')",
            "spec.model.uri must name one repository; write hf://owner/name or hf://owner/name@<commit>",
        ),
        _rule(
            "!has(self.revision) || (self.uri.startsWith('hf://') && !self.uri.contains('@'))",
            "spec.model.revision: only an hf:// uri without '@' takes a revision; remove one of the two",
        ),
        _rule(
            "!self.uri.contains('@') || self.uri.startsWith('hf://')",
            "spec.model.uri carries user information before '@'; name a Secret in credentials.secretName instead",
        ),
    ),
    "spec.dataset": (
        _once("spec.dataset", "train", "uri"),
        _rule(
            "!has(self.validation) || !has(self.validation.sources) || "
            "!self.validation.sources.exists(s, self.train.exists(t, t.uri == s.uri))",
            "spec.dataset.validation.sources names training data as well; use other files, or validation.fraction",
        ),
    ),
    "spec.dataset.train[]": (
        *_LOCATION,
        _not_file("!self.uri.startsWith('file://')", "spec.dataset.train"),
        _readable("spec.dataset.train"),
    ),
    "spec.dataset.validation": (
        _rule(
            "has(self.fraction) != (has(self.sources) && self.sources.size() > 0)",
            "spec.dataset.validation needs either fraction or sources; set one of the two",
        ),
        _once("spec.dataset.validation", "sources", "uri"),
    ),
    "spec.dataset.validation.sources[]": (
        *_LOCATION,
        _not_file("!self.uri.startsWith('file://')", "spec.dataset.validation.sources"),
        _readable("spec.dataset.validation.sources"),
    ),
    "spec.output": (
        *_LOCATION,
        _rule("!self.uri.contains('*')", "spec.output.uri is a pattern; name one directory"),
        _not_file("!self.uri.startsWith('file://')", "spec.output.uri"),
    ),
    "spec.method": (
        _member("method", "lora", ("LoRA", "QLoRA"), "method"),
        _member("method", "quantization", ("QLoRA",), "method"),
    ),
    "spec.method.lora": (
        _rule(
            "!has(self.targetModules) || self.targetModules.size() == 1 || "
            f"!self.targetModules.exists(m, m == '{ALL_LINEAR}')",
            "spec.method.lora.targetModules names all-linear and others; keep all-linear alone, or the names alone",
        ),
        _rule(
            "!has(self.modulesToSave) || !has(self.targetModules) || "
            "!self.modulesToSave.exists(m, m in self.targetModules)",
            "spec.method.lora.modulesToSave names a module of targetModules; keep it in one of the two",
        ),
        _rule(
            f"!has(self.modulesToSave) || !('{ALL_LINEAR}' in self.modulesToSave)",
            "spec.method.lora.modulesToSave: all-linear is no module that can be saved whole; use method Full",
        ),
        _once("spec.method.lora", "targetModules"),
        _once("spec.method.lora", "modulesToSave"),
    ),
    "spec.training": (
        _rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "spec.training has both epochs and maxSteps; keep one of the two",
        ),
        _rule(
            "!has(self.maxSteps) || !has(self.schedule) || !has(self.schedule.warmupSteps) || "
            "self.schedule.warmupSteps <= self.maxSteps",
            "spec.training.schedule.warmupSteps must be at most maxSteps; use fewer, or warmupFraction",
        ),
        _rule(
            "!has(self.earlyStopping) || has(self.evaluateEverySteps)",
            "spec.training.earlyStopping: nothing is evaluated before the end; set evaluateEverySteps, or remove it",
        ),
    ),
    "spec.training.schedule": (
        _rule(
            "!(has(self.warmupFraction) && has(self.warmupSteps))",
            "spec.training.schedule has both warmupFraction and warmupSteps; keep one of the two",
        ),
        *(_schedule_member(*field) for field in SCHEDULE_FIELDS),
    ),
    "spec.training.optimizer": (
        _rule(
            "!has(self.momentum) || self.momentum == 0.0 || (has(self.type) && self.type == 'SGD')",
            "spec.training.optimizer.momentum belongs to type SGD only; remove it, or set type: SGD",
        ),
        *(
            _rule(
                f"!has(self.{name}) || self.{name} == {default} || !has(self.type) || "
                "self.type in ['AdamW', 'AdamW8bit', 'PagedAdamW8bit']",
                f"spec.training.optimizer.{name} belongs to the types of AdamW only; remove it, or set type: AdamW",
            )
            for name, default in (("beta1", 0.9), ("beta2", 0.999))
        ),
    ),
    "spec.distributed.strategy": (
        _member("strategy", "fsdp", ("FSDP",), "distributed.strategy"),
        _member("strategy", "deepspeed", ("DeepSpeed",), "distributed.strategy"),
    ),
    "spec.distributed.strategy.deepspeed": (
        _rule(
            "!has(self.offloadParameters) || self.offloadParameters == 'None' || "
            "(has(self.zeroStage) && self.zeroStage == 3)",
            "spec.distributed.strategy.deepspeed.offloadParameters needs ZeRO stage 3; set zeroStage: 3",
        ),
        _offload("offloadOptimizer"),
        _offload("offloadParameters"),
    ),
    "spec.resources": (_at_most("cpu"), _at_most("memory")),
    "spec.placement.tolerations[]": (
        _rule(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "spec.placement.tolerations: operator Exists takes no value; remove it, or use Equal",
        ),
        _rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "spec.placement.tolerations.tolerationSeconds goes with NoExecute only; set effect: NoExecute",
        ),
    ),
}
