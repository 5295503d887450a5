"""What was chosen for the user, told with its reason; and what is allowed but probably not meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.batch import SELF_RISING
from finetune_api.memory import Layout, estimate_memory, memory_budget
from finetune_api.parameters import count_parameters
from finetune_api.plan import DatasetFacts, Decision, Facts, ParameterCounts, ResolvedStrategy
from finetune_api.quantities import format_bytes
from finetune_api.spec import FineTuneJobSpec, LoraOptions, MethodType, QuantizationOptions, Sharding, StrategyType
from finetune_api.strategy import fsdp

_DEFAULT_REASONS: tuple[tuple[str, str], ...] = (
    ("dataset.max_sequence_length", "default; longer rows follow truncation"),
    ("dataset.packing", "default; rows are packed exactly, samples never see each other"),
    ("dataset.loss_on", "default; prompts carry no loss"),
    ("dataset.truncation", "default; a sample that is too long is dropped whole and counted"),
    ("training.global_batch_size", "default"),
    ("training.learning_rate", "default; usual for adapters"),
    ("training.schedule.type", "default"),
    ("training.optimizer.type", "default"),
    ("training.max_gradient_norm", "default"),
    ("training.precision", "default; the range of FP32 in 16 bit, no loss scaling"),
    ("training.seed", "default"),
    ("checkpoint.every_minutes", "default"),
)


def spec_decisions(spec: FineTuneJobSpec) -> Iterator[Decision]:
    """Defaults that shape the result and that the user left open."""
    full = spec.method.type is MethodType.FULL
    if spec.output.format is None:
        value = "FullModel" if full else "Adapter"
        yield Decision(field="spec.output.format", value=value, reason=f"what method {spec.method.type.value} trains")
    if spec.training.epochs is None and spec.training.max_steps is None:
        yield Decision(field="spec.training.epochs", value="1", reason="neither epochs nor maxSteps is given")
    if spec.method.lora is None and not full:
        lora = LoraOptions()
        value = f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.target_modules)}"
        yield Decision(field="spec.method.lora", value=value, reason="default")
    if spec.method.type is MethodType.QLORA:
        yield from _quantization_decisions(spec)
    for path, reason in _DEFAULT_REASONS:
        value = _unset(spec, path.split("."))
        if value is not None:
            yield Decision(field=f"spec.{_camel(path)}", value=_text(value), reason=reason)


def _quantization_decisions(spec: FineTuneJobSpec) -> Iterator[Decision]:
    options = spec.method.quantization or QuantizationOptions()
    if spec.method.quantization is None:
        value = f"{options.type.value}, double quantisation"
        yield Decision(field="spec.method.quantization", value=value, reason="default")
    if options.compute_type is None:
        precision = spec.training.precision.value
        yield Decision(field="spec.method.quantization.computeType", value=precision, reason="as training.precision")


def _unset(node: Any, path: list[str]) -> Any:
    """The value at ``path`` if the user left it out, else ``None``."""
    for name in path[:-1]:
        if name not in node.model_fields_set:
            node = getattr(node, name)
            return _default(node, path[path.index(name) + 1 :])
        node = getattr(node, name)
    return None if path[-1] in node.model_fields_set else getattr(node, path[-1])


def _default(node: Any, path: list[str]) -> Any:
    for name in path:
        node = getattr(node, name)
    return node


def _camel(path: str) -> str:
    return ".".join(
        head + "".join(word.title() for word in rest) for head, *rest in (p.split("_") for p in path.split("."))
    )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def spec_warnings(spec: FineTuneJobSpec) -> tuple[str, ...]:
    """Allowed, but probably not meant."""
    found = []
    training = spec.training
    if spec.method.type is MethodType.FULL and _unset(spec, ["training", "learning_rate"]) is not None:
        found.append(
            f"spec.training.learningRate: the default {training.learning_rate:g} suits adapters; "
            "full fine-tuning of a pre-trained model usually wants 1e-5 to 5e-5"
        )
    if spec.method.type is not MethodType.FULL and spec.model.initialization.value == "Random":
        found.append("spec.model.initialization: an adapter on random weights learns little; method Full is usual")
    return tuple(found)


def step_decisions(spec: FineTuneJobSpec, warmup: int, steps: int) -> Iterator[Decision]:
    """Choices that show once the number of steps is known."""
    schedule = spec.training.schedule
    if schedule.type not in SELF_RISING and schedule.warmup_fraction is None and schedule.warmup_steps is None:
        reason = f"3 % of {steps} steps: neither warmupFraction nor warmupSteps is given"
        yield Decision(field="spec.training.schedule.warmupSteps", value=str(warmup), reason=reason)


def step_warnings(spec: FineTuneJobSpec, dataset: DatasetFacts | None) -> Iterator[str]:
    """What the size of the data set makes doubtful."""
    samples = dataset.train_samples if dataset and dataset.exact else None
    if samples and samples < spec.training.global_batch_size:
        yield (
            f"spec.training.globalBatchSize: one step of {spec.training.global_batch_size} samples sees the "
            f"{samples} training samples more than once"
        )


def fit_warnings(
    spec: FineTuneJobSpec, facts: Facts, counts: ParameterCounts | None, layout: Layout, smaller: Layout
) -> Iterator[str]:
    """A plan that needs more memory than the user says there is, with what would fit."""
    budget = memory_budget(spec, layout.processes_per_node)
    estimate = estimate_memory(spec, facts, counts, layout)
    if estimate is None or not budget.known or estimate.total <= budget.bytes:
        return
    options: list[tuple[str, FineTuneJobSpec, Layout]] = [
        ("microBatchSize 1 with gradientCheckpointing Full", spec, smaller)
    ]
    for label, strategy in _alternatives(layout, offload=spec.resources.accelerator is not None):
        options.append((label, spec, Layout(strategy, *_rest(smaller))))
    if spec.method.type is not MethodType.QLORA and not (facts.model and facts.model.experts):
        method = spec.method.model_copy(update={"type": MethodType.QLORA})
        options.append(("method QLoRA", spec.model_copy(update={"method": method}), smaller))
    for label, other, option in options:
        other_estimate = estimate_memory(other, facts, _counts(other, facts), option)
        if other_estimate and other_estimate.total <= budget.bytes:
            fitting = f"{label} would need {format_bytes(other_estimate.total)}"
            break
    else:
        fitting = "nothing in reach fits: use more devices, larger ones or a shorter maxSequenceLength"
    place = "accelerator.memory" if spec.resources.accelerator else "limits.memory"
    yield (
        f"spec.resources.{place}: the plan needs about {format_bytes(estimate.total)} per device and "
        f"{format_bytes(budget.bytes)} are usable; {fitting}"
    )


def _alternatives(layout: Layout, offload: bool) -> Iterator[tuple[str, ResolvedStrategy]]:
    if layout.world_size > 1 and layout.strategy.type is StrategyType.DDP:
        yield "strategy FSDP", fsdp(Sharding.FULL)
    if offload:
        yield "strategy FSDP with cpuOffload", fsdp(Sharding.FULL, cpu_offload=True)


def _rest(layout: Layout) -> tuple[Any, ...]:
    return layout.world_size, layout.processes_per_node, layout.micro_batch_size, layout.checkpointing


def _counts(spec: FineTuneJobSpec, facts: Facts) -> ParameterCounts | None:
    return count_parameters(spec, facts.model) if facts.model else None
