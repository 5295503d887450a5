"""What a manifest may not say: rules over several fields of the spec, in the order they are told.

Each is a small pure function; the tuple at the end is the whole list. Combinations that depend on what the plan
resolves (strategy, device, model) stand in ``compatibility.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune_api.deepspeed_options import configuration_problems
from finetune_api.errors import Problem
from finetune_api.parameters import ALL_LINEAR
from finetune_api.quantities import quantity_value
from finetune_api.rules import Rule
from finetune_api.spec import (
    DataSource,
    FineTuneJobSpec,
    MethodType,
    ObjectLocation,
    OptimizerType,
    ScheduleType,
    StrategyType,
    Toleration,
)
from finetune_api.uris import uri_trouble, without_secrets

UNREADABLE = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
    ".xlsx",
    ".xls",
    ".pkl",
    ".pickle",
    ".pt",
)
SINGLE_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".onnx")


@dataclass(frozen=True)
class Placed:
    """A spec and where it is to run."""

    spec: FineTuneJobSpec
    cluster: bool


def locations(spec: FineTuneJobSpec) -> Iterator[tuple[str, str, ObjectLocation]]:
    """(path, uri, location) of everything that has a URI."""
    yield "spec.model", spec.model.uri, spec.model
    for path, source in sources(spec):
        yield path, source.uri, source
    yield "spec.output", spec.output.uri, spec.output


def sources(spec: FineTuneJobSpec) -> Iterator[tuple[str, DataSource]]:
    """(path, source) of training and validation data."""
    for index, source in enumerate(spec.dataset.train):
        yield f"spec.dataset.train[{index}]", source
    for index, source in enumerate(spec.dataset.validation.sources if spec.dataset.validation else ()):
        yield f"spec.dataset.validation.sources[{index}]", source


def _uris(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for path, uri, _ in locations(spec):
        trouble = uri_trouble(uri, path.split(".")[1]) if uri else None
        if trouble:
            yield Problem(f"{path}.uri", without_secrets(uri), *trouble)


def _revision(spec: FineTuneJobSpec) -> Iterator[Problem]:
    uri, revision = spec.model.uri, spec.model.revision
    if revision is None:
        return
    if not uri.startswith("hf://"):
        yield Problem("spec.model.revision", revision, "only hf:// models have a revision", "remove it")
    elif "@" in uri:
        yield Problem("spec.model.revision", revision, "the uri names a revision already", "keep one of the two")


def _model_uri(spec: FineTuneJobSpec) -> Iterator[Problem]:
    uri = spec.model.uri
    if uri.endswith(SINGLE_FILES):
        yield Problem("spec.model.uri", uri, "is one file", "name the directory with config.json and *.safetensors")
    if "*" in uri:
        yield Problem("spec.model.uri", uri, "is a pattern", "name one directory")


def _output_uri(spec: FineTuneJobSpec) -> Iterator[Problem]:
    if "*" in spec.output.uri:
        yield Problem("spec.output.uri", spec.output.uri, "is a pattern", "name one directory")


def _location_options(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for path, uri, location in locations(spec):
        scheme = (uri or "").partition("://")[0]
        if location.endpoint is not None and scheme not in {"s3", "gs", "az", "hf"}:
            yield Problem(f"{path}.endpoint", location.endpoint, f"{scheme}:// has no endpoint", "remove it")
        if location.region is not None and scheme != "s3":
            yield Problem(f"{path}.region", location.region, "only s3:// has a region", "remove it")
        if location.path_style is not None and scheme != "s3":
            yield Problem(f"{path}.pathStyle", location.path_style, "only s3:// has a path style", "remove it")
        if location.credentials is not None and scheme in {"file", "pvc"}:
            yield Problem(f"{path}.credentials", None, f"{scheme}:// needs no credentials", "remove them")


def _data_files(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for path, source in sources(spec):
        if source.uri and source.uri.lower().endswith(UNREADABLE):
            remedy = "use JSONL (plain, .gz, .zst), Parquet, Arrow or CSV"
            yield Problem(f"{path}.uri", source.uri, "is no format that can be read", remedy)


def _twice(path: str, names: Iterable[str]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Problem(f"{path}[{index}]", name, "is listed twice", "remove it")
        seen.add(name)


def _duplicate_sources(spec: FineTuneJobSpec) -> Iterator[Problem]:
    train = {source.uri for source in spec.dataset.train}
    seen: set[str] = set()
    for path, source in sources(spec):
        held_out = path.startswith("spec.dataset.validation")
        if held_out and source.uri in train:
            remedy = "use other files, or validation.fraction"
            yield Problem(f"{path}.uri", source.uri, "is training data as well", remedy)
        elif source.uri in seen:
            yield Problem(f"{path}.uri", source.uri, "is listed twice", "remove it, or set weight on one of them")
        seen.add(source.uri)


def _validation_choice(spec: FineTuneJobSpec) -> Iterator[Problem]:
    validation = spec.dataset.validation
    if validation is None:
        return
    if validation.fraction is not None and validation.sources:
        yield Problem("spec.dataset.validation", None, "has both fraction and sources", "keep one of the two")
    if validation.fraction is None and not validation.sources:
        yield Problem("spec.dataset.validation", None, "has neither fraction nor sources", "set one of the two")


def _method_members(spec: FineTuneJobSpec) -> Iterator[Problem]:
    kind = spec.method.type
    if spec.method.lora is not None and kind is MethodType.FULL:
        yield Problem("spec.method.lora", None, "does not belong to method Full", "remove it, or use type LoRA")
    if spec.method.quantization is not None and kind is not MethodType.QLORA:
        remedy = "remove it, or use type QLoRA"
        yield Problem("spec.method.quantization", None, f"does not belong to method {kind.value}", remedy)


def _targets(spec: FineTuneJobSpec) -> Iterator[Problem]:
    lora = spec.method.lora
    if lora is None:
        return
    path = "spec.method.lora.targetModules"
    yield from _twice(path, lora.target_modules)
    yield from _twice("spec.method.lora.modulesToSave", lora.modules_to_save)
    if ALL_LINEAR in lora.target_modules and len(set(lora.target_modules)) > 1:
        others = ", ".join(name for name in lora.target_modules if name != ALL_LINEAR)
        yield Problem(path, None, f"names all-linear and {others}", "keep all-linear alone, or the names alone")
    for index, name in enumerate(lora.modules_to_save):
        if name in lora.target_modules:
            rule = "is adapted by targetModules as well"
            yield Problem(f"spec.method.lora.modulesToSave[{index}]", name, rule, "keep it in one of the two")
        if name == ALL_LINEAR:
            rule = "is no module that can be saved whole"
            yield Problem(f"spec.method.lora.modulesToSave[{index}]", name, rule, "use method Full")


def _duration(spec: FineTuneJobSpec) -> Iterator[Problem]:
    if spec.training.epochs is not None and spec.training.max_steps is not None:
        yield Problem("spec.training", None, "has both epochs and maxSteps", "keep one of the two")


def _warmup(spec: FineTuneJobSpec) -> Iterator[Problem]:
    schedule, steps = spec.training.schedule, spec.training.max_steps
    path = "spec.training.schedule"
    if schedule.warmup_fraction is not None and schedule.warmup_steps is not None:
        yield Problem(path, None, "has both warmupFraction and warmupSteps", "keep one of the two")
    elif schedule.warmup_steps is not None and steps is not None and schedule.warmup_steps > steps:
        rule = f"must be at most the {steps} steps of maxSteps"
        yield Problem(f"{path}.warmupSteps", schedule.warmup_steps, rule, "use fewer, or warmupFraction")


_EVERY = frozenset(ScheduleType)
_RISING = frozenset({ScheduleType.ONE_CYCLE, ScheduleType.SLANTED_TRIANGULAR})
SCHEDULE_FIELDS: tuple[tuple[str, str, frozenset[ScheduleType]], ...] = (
    ("warmup_fraction", "warmupFraction", _EVERY - _RISING),
    ("warmup_steps", "warmupSteps", _EVERY - _RISING),
    ("minimum_fraction", "minimumFraction", _EVERY - {ScheduleType.CONSTANT}),
    ("cycles", "cycles", frozenset({ScheduleType.COSINE})),
    ("power", "power", frozenset({ScheduleType.POLYNOMIAL})),
    ("decay_fraction", "decayFraction", frozenset({ScheduleType.WARMUP_STABLE_DECAY})),
    ("peak_fraction", "peakFraction", _RISING),
    ("initial_ratio", "initialRatio", _RISING),
)


def _schedule_members(spec: FineTuneJobSpec) -> Iterator[Problem]:
    schedule = spec.training.schedule
    for name, alias, types in SCHEDULE_FIELDS:
        value = getattr(schedule, name)
        if schedule.type in types or value in {None, type(schedule).model_fields[name].default}:
            continue
        fitting = ", ".join(kind.value for kind in ScheduleType if kind in types)
        rule = f"does not belong to schedule {schedule.type.value}"
        yield Problem(f"spec.training.schedule.{alias}", value, rule, f"remove it, or use type {_choice(fitting)}")


def _choice(listed: str) -> str:
    head, comma, last = listed.rpartition(", ")
    return f"{head} or {last}" if comma else last


def _optimizer_members(spec: FineTuneJobSpec) -> Iterator[Problem]:
    optimizer = spec.training.optimizer
    adam = {OptimizerType.ADAMW, OptimizerType.ADAMW_8BIT, OptimizerType.PAGED_ADAMW_8BIT}
    if optimizer.momentum and optimizer.type is not OptimizerType.SGD:
        rule = f"does not belong to optimizer {optimizer.type.value}"
        yield Problem("spec.training.optimizer.momentum", optimizer.momentum, rule, "remove it, or use type SGD")
    for name, default in (("beta1", 0.9), ("beta2", 0.999)):
        value = getattr(optimizer, name)
        if value != default and optimizer.type not in adam:
            rule = f"does not belong to optimizer {optimizer.type.value}"
            yield Problem(f"spec.training.optimizer.{name}", value, rule, "remove it, or use type AdamW")


def _evaluation(spec: FineTuneJobSpec) -> Iterator[Problem]:
    training, validation = spec.training, spec.dataset.validation
    if training.evaluate_every_steps is not None and validation is None:
        rule = "there is no validation data to evaluate on"
        value = training.evaluate_every_steps
        yield Problem("spec.training.evaluateEverySteps", value, rule, "set dataset.validation, or remove it")
    if training.early_stopping is None:
        return
    path = "spec.training.earlyStopping"
    if validation is None:
        yield Problem(path, None, "there is no validation data to judge by", "set dataset.validation, or remove it")
    if training.evaluate_every_steps is None:
        remedy = "set evaluateEverySteps, or remove it"
        yield Problem(path, None, "nothing is evaluated before the end without evaluateEverySteps", remedy)


def _strategy_members(spec: FineTuneJobSpec) -> Iterator[Problem]:
    strategy = spec.distributed.strategy
    members = (("fsdp", strategy.fsdp, StrategyType.FSDP), ("deepspeed", strategy.deepspeed, StrategyType.DEEPSPEED))
    for name, member, owner in members:
        if member is not None and strategy.type is not owner:
            rule = f"does not belong to strategy {strategy.type.value}"
            yield Problem(f"spec.distributed.strategy.{name}", None, rule, f"remove it, or use type {owner.value}")


def _configuration(spec: FineTuneJobSpec) -> Iterator[Problem]:
    options = spec.distributed.strategy.deepspeed
    if options is not None:
        yield from configuration_problems(options.configuration)


def _ranks(spec: FineTuneJobSpec) -> Iterator[Problem]:
    given, accelerator = spec.distributed.processes_per_node, spec.resources.accelerator
    if given is not None and accelerator is not None and given != accelerator.count:
        rule = f"must equal the {accelerator.count} accelerators of a pod (resources.accelerator.count)"
        yield Problem("spec.distributed.processesPerNode", given, rule, f"use {accelerator.count}, or leave it out")


def _amounts(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for name in ("cpu", "memory"):
        request, limit = getattr(spec.resources.requests, name), getattr(spec.resources.limits, name)
        if request and limit and quantity_value(request) > quantity_value(limit):
            rule = f"must be at most resources.limits.{name} ({limit})"
            yield Problem(f"spec.resources.requests.{name}", request, rule, "lower it, or raise the limit")


def _tolerations(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for index, toleration in enumerate(spec.placement.tolerations):
        yield from toleration_problems(toleration, f"spec.placement.tolerations[{index}]")


def toleration_problems(toleration: Toleration, path: str) -> Iterator[Problem]:
    """Fields of one toleration that do not go together."""
    if toleration.operator == "Exists" and toleration.value:
        yield Problem(f"{path}.value", toleration.value, "operator Exists takes no value", "remove it, or use Equal")
    if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
        rule = "only effect NoExecute is tolerated for a time"
        yield Problem(f"{path}.tolerationSeconds", toleration.toleration_seconds, rule, "set effect: NoExecute")


def _place(placed: Placed) -> Iterator[Problem]:
    for path, uri, _ in locations(placed.spec):
        if placed.cluster and uri.startswith("file://"):
            remedy = "use object storage or pvc://, or run it with 'finetune run'"
            yield Problem(f"{path}.uri", uri, "file:// names nothing that all pods of a cluster share", remedy)
        if not placed.cluster and uri.startswith("pvc://"):
            yield Problem(f"{path}.uri", uri, "pvc:// names a volume of a cluster", "use file:// for a local run")


_URIS = ("model.uri", "dataset", "output.uri")

SPEC_RULES: tuple[Rule[FineTuneJobSpec], ...] = (
    Rule(_URIS, _uris),
    Rule(("model.uri", "model.revision"), _revision),
    Rule(("model.uri",), _model_uri),
    Rule(("output.uri",), _output_uri),
    Rule(("model", "dataset.train", "dataset.validation", "output"), _location_options),
    Rule(("dataset.train", "dataset.validation"), _data_files),
    Rule(("dataset.train", "dataset.validation"), _duplicate_sources),
    Rule(("dataset.validation",), _validation_choice),
    Rule(("method.type", "method.lora", "method.quantization"), _method_members),
    Rule(("method.lora.targetModules", "method.lora.modulesToSave"), _targets),
    Rule(("training.epochs", "training.maxSteps"), _duration),
    Rule(("training.schedule.warmupFraction", "training.schedule.warmupSteps", "training.maxSteps"), _warmup),
    Rule(("training.schedule",), _schedule_members),
    Rule(("training.optimizer",), _optimizer_members),
    Rule(("training.evaluateEverySteps", "training.earlyStopping", "dataset.validation"), _evaluation),
    Rule(("distributed.strategy.type",), _strategy_members),
    Rule(("distributed.strategy.deepspeed.configuration",), _configuration),
    Rule(("distributed.processesPerNode", "resources.accelerator"), _ranks),
    Rule(("resources.requests", "resources.limits"), _amounts),
    Rule(("placement.tolerations",), _tolerations),
)

PLACE_RULES: tuple[Rule[Placed], ...] = (Rule(_URIS, _place),)
