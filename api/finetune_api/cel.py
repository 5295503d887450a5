"""Rules that the API server judges (CEL), with messages that name the field and the remedy.

The same rules in Python stand in ``spec_rules.py`` and ``compatibility.py``; tests hold both to the same manifests.
Every rule stands at the block that owns its fields, so that unset blocks cost nothing.
"""

from __future__ import annotations

from typing import Any

IMMUTABLE_REQUIRED = ("model", "dataset", "method", "output")
IMMUTABLE_OPTIONAL = ("task", "training", "distributed")


def _rule(expression: str, message: str, path: str = "") -> dict[str, Any]:
    entry = {"rule": expression, "message": message}
    return {**entry, "fieldPath": path} if path else entry


def _frozen(name: str) -> dict[str, Any]:
    message = f"spec.{name} is immutable because it defines the result; create a new job with another name"
    if name in IMMUTABLE_REQUIRED:
        return _rule(f"self.{name} == oldSelf.{name}", message, f".{name}")
    absent = f"has(self.{name}) == has(oldSelf.{name})"
    return _rule(f"{absent} && (!has(self.{name}) || self.{name} == oldSelf.{name})", message)


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


_LOCATION = (
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
_BATCH = "(has(self.training) && has(self.training.globalBatchSize) ? self.training.globalBatchSize : 32)"
_STRATEGY = "has(self.distributed) && has(self.distributed.strategy) && has(self.distributed.strategy.type)"

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
            f"{_BATCH} % ({_NODES} * {_PROCESSES}) == 0",
            "spec.training.globalBatchSize must be a multiple of the ranks (nodes x processesPerNode); change either",
        ),
    ),
    "spec.model": (
        _rule(
            "!self.uri.contains('*') && "
            "!['.safetensors', '.bin', '.pt', '.pth', '.gguf'].exists(suffix, self.uri.endsWith(suffix))",
            "spec.model.uri names a file or pattern; name the directory with config.json and *.safetensors",
        ),
        *_LOCATION,
        _not_file("!self.uri.startsWith('file://')", "spec.model.uri"),
        _rule(
            "!has(self.revision) || (self.uri.startsWith('hf://') && !self.uri.contains('@'))",
            "spec.model.revision: only an hf:// uri without '@' takes a revision; remove one of the two",
        ),
        _rule(
            "!self.uri.contains('@') || self.uri.startsWith('hf://')",
            "spec.model.uri carries user information before '@'; name a Secret in credentials.secretName instead",
        ),
    ),
    "spec.dataset.train[]": (*_LOCATION, _not_file("!self.uri.startsWith('file://')", "spec.dataset.train")),
    "spec.dataset.validation": (
        _rule(
            "has(self.fraction) != (has(self.sources) && self.sources.size() > 0)",
            "spec.dataset.validation needs either fraction or sources; set one of the two",
        ),
    ),
    "spec.dataset.validation.sources[]": (
        *_LOCATION,
        _not_file("!self.uri.startsWith('file://')", "spec.dataset.validation.sources"),
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
            "!self.targetModules.exists(m, m == 'all-linear')",
            "spec.method.lora.targetModules names all-linear and others; keep all-linear alone, or the names alone",
        ),
        _rule(
            "!has(self.modulesToSave) || !has(self.targetModules) || "
            "!self.modulesToSave.exists(m, m in self.targetModules)",
            "spec.method.lora.modulesToSave names a module of targetModules; keep it in one of the two",
        ),
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
    ),
}
