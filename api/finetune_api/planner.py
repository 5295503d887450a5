"""FineTuneJobSpec and facts -> Plan. Pure: the same answer on every machine that asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from finetune_api.batch import batch_problems, largest_divisor, steps_per_epoch, total_steps, warmup_steps
from finetune_api.compatibility import Combination, combination_problems
from finetune_api.decisions import fit_warnings, spec_decisions, spec_warnings, step_decisions, step_warnings
from finetune_api.errors import DataError, Problem, SpecError
from finetune_api.introspect import Path
from finetune_api.memory import Layout, estimate_memory, memory_budget
from finetune_api.names import nearest
from finetune_api.parameters import count_parameters, module_names, shape_of, unmatched_names
from finetune_api.plan import (
    CheckpointingMode,
    DatasetFacts,
    Decision,
    Facts,
    ModelFacts,
    ParameterCounts,
    Plan,
    ResolvedStrategy,
)
from finetune_api.rules import Rule, ask
from finetune_api.spec import FineTuneJobSpec, GradientCheckpointing, LoraOptions, MethodType, OutputFormat
from finetune_api.strategy import resolve_strategy
from finetune_api.trainer_config import JobIdentity

CUDA_MICRO_BATCH_TOKENS = 16_384
CPU_MICRO_BATCH_TOKENS = 4_096


@dataclass(frozen=True)
class _Job:
    """What every question below is asked about."""

    spec: FineTuneJobSpec
    facts: Facts
    processes_per_node: int
    strategy: ResolvedStrategy
    counts: ParameterCounts | None

    @property
    def world_size(self) -> int:
        return self.spec.distributed.nodes * self.processes_per_node

    @property
    def device(self) -> str:
        return "cuda" if self.spec.resources.accelerator else "cpu"

    def layout(self, micro_batch_size: int, checkpointing: CheckpointingMode) -> Layout:
        return Layout(self.strategy, self.world_size, self.processes_per_node, micro_batch_size, checkpointing)

    def fits(self, micro_batch_size: int, checkpointing: CheckpointingMode) -> bool | None:
        """Whether it fits in the memory budget; ``None`` where the model is unknown."""
        estimate = estimate_memory(self.spec, self.facts, self.counts, self.layout(micro_batch_size, checkpointing))
        return None if estimate is None else estimate.total <= memory_budget(self.spec, self.processes_per_node).bytes


def make_plan(spec: FineTuneJobSpec, facts: Facts, job: JobIdentity) -> Plan:
    """What will run for this spec, given what is known of model and data.

    Raises:
        SpecError: every combination that cannot work and every number that does not divide, with the nearest that does.
    """
    processes, processes_reason = _processes_per_node(spec)
    strategy, strategy_reason = resolve_strategy(spec, facts, processes)
    counts = count_parameters(spec, facts.model) if facts.model else None
    question = _Job(spec, facts, processes, strategy, counts)
    problems = plan_problems(spec, facts, processes, strategy)
    if problems:
        raise SpecError(problems)
    checkpointing, checkpointing_reason = _checkpointing(question)
    micro, micro_reason = _micro_batch(question, checkpointing)
    decisions = [
        Decision(field="spec.distributed.processesPerNode", value=str(processes), reason=processes_reason),
        Decision(field="spec.distributed.strategy.type", value=strategy.label, reason=strategy_reason),
        Decision(field="spec.training.microBatchSize", value=str(micro), reason=micro_reason),
        Decision(field="spec.training.gradientCheckpointing", value=checkpointing.value, reason=checkpointing_reason),
    ]
    prefix = f"{spec.output.uri.rstrip('/')}/{job.namespace}/{job.name}/{job.uid}/"
    plan = Plan(
        world_size=question.world_size,
        nodes=spec.distributed.nodes,
        processes_per_node=processes,
        device=question.device,
        strategy=strategy,
        method=spec.method.type,
        precision=spec.training.precision,
        micro_batch_size=micro,
        gradient_accumulation_steps=spec.training.global_batch_size // (question.world_size * micro),
        global_batch_size=spec.training.global_batch_size,
        gradient_checkpointing=checkpointing,
        model_revision=_revision(spec, facts.model),
        output_format=_output_format(spec),
        artifact_prefix=prefix,
        checkpoint_prefix=f"{prefix}checkpoints/",
        decisions=(*(decision for decision in decisions if decision.reason), *spec_decisions(spec)),
        warnings=spec_warnings(spec),
    )
    plan = _with_model(plan, spec, facts)
    return _with_steps(plan, spec, facts.dataset)


def complete_plan(plan: Plan, spec: FineTuneJobSpec, dataset: DatasetFacts, model: ModelFacts | None = None) -> Plan:
    """The plan with everything that only prepared data tells: step counts, and the model's numbers if new.

    What was decided before (strategy, micro-batch) stays, so that every node and every restart runs the same.

    Raises:
        DataError: there is no training sample.
        SpecError: the model or the number of steps contradicts the spec.
    """
    if not dataset.train_samples:
        raise DataError("spec.dataset.train: no training sample is left after preparation; check format and truncation")
    facts = Facts(model=model, dataset=dataset)
    if model is not None:
        problems = plan_problems(spec, facts, plan.processes_per_node, plan.strategy)
        if problems:
            raise SpecError(problems)
        plan = _with_model(plan, spec, facts)
    return _with_steps(plan, spec, dataset)


def plan_problems(
    spec: FineTuneJobSpec, facts: Facts, processes_per_node: int, strategy: ResolvedStrategy
) -> list[Problem]:
    """Everything that forbids this spec from running."""
    world_size = spec.distributed.nodes * processes_per_node
    device = "cuda" if spec.resources.accelerator else "cpu"
    problems = list(batch_problems(spec, world_size))
    problems += combination_problems(Combination(spec, strategy, device, world_size, facts.model))
    problems += _target_problems(spec, facts.model)
    return problems


_BATCH_FIELDS = (
    "training.globalBatchSize",
    "training.microBatchSize",
    "distributed.nodes",
    "distributed.processesPerNode",
    "resources.accelerator",
)


def specification_problems(spec: FineTuneJobSpec, broken: Iterable[Path] = ()) -> Iterator[Problem]:
    """What the planner refuses before anything is known of model and data, where ``broken`` fields cannot be judged."""
    processes, _ = _processes_per_node(spec)
    strategy, _ = resolve_strategy(spec, Facts(), processes)
    world_size = spec.distributed.nodes * processes
    device = "cuda" if spec.resources.accelerator else "cpu"
    yield from ask((Rule(_BATCH_FIELDS, lambda s: batch_problems(s, world_size)),), spec, broken)
    yield from combination_problems(Combination(spec, strategy, device, world_size, None), broken)


def _target_problems(spec: FineTuneJobSpec, model: ModelFacts | None) -> list[Problem]:
    """LoRA targets that fit no module of a known architecture."""
    shape = shape_of(model) if model else None
    if shape is None or model is None or spec.method.type is MethodType.FULL:
        return []
    lora = spec.method.lora or LoraOptions()
    problems = []
    for field, names in (("targetModules", lora.target_modules), ("modulesToSave", lora.modules_to_save)):
        for name in unmatched_names(shape, names):
            known = module_names(shape)
            guess = nearest(name, known)
            remedy = f"did you mean {guess}?" if guess else f"use all-linear or some of {', '.join(known)}"
            problems.append(
                Problem(f"spec.method.lora.{field}", name, f"fits no module of {model.architecture}", remedy)
            )
    return problems


def _processes_per_node(spec: FineTuneJobSpec) -> tuple[int, str]:
    given, accelerator = spec.distributed.processes_per_node, spec.resources.accelerator
    if given is not None:
        return given, ""
    if accelerator is not None:
        return accelerator.count, "one rank per accelerator of a pod"
    return 1, "one rank per pod on CPU"


def _checkpointing(job: _Job) -> tuple[CheckpointingMode, str]:
    asked = job.spec.training.gradient_checkpointing
    if asked is not GradientCheckpointing.AUTO:
        return CheckpointingMode(asked.value), ""
    target = job.spec.training.micro_batch_size or _token_limited(job)
    fits = job.fits(target, CheckpointingMode.NONE)
    if fits is None:
        if job.device == "cpu":
            return CheckpointingMode.NONE, "on CPU recomputing costs more than the memory it saves"
        return CheckpointingMode.FULL, "whether all activations fit is not known before the model is"
    if fits:
        return CheckpointingMode.NONE, "all activations fit in memory, so nothing is recomputed"
    return CheckpointingMode.FULL, "the activations of all layers do not fit in memory, so they are recomputed"


def _token_limited(job: _Job) -> int:
    """The largest micro-batch that divides a rank's share and keeps to the token limit of the device."""
    share = job.spec.training.global_batch_size // job.world_size
    tokens = CUDA_MICRO_BATCH_TOKENS if job.device == "cuda" else CPU_MICRO_BATCH_TOKENS
    return largest_divisor(share, max(1, tokens // job.spec.dataset.max_sequence_length))


def _micro_batch(job: _Job, checkpointing: CheckpointingMode) -> tuple[int, str]:
    if job.spec.training.micro_batch_size is not None:
        return job.spec.training.micro_batch_size, ""
    share = job.spec.training.global_batch_size // job.world_size
    micro = limit = _token_limited(job)
    while micro > 1 and job.fits(micro, checkpointing) is False:
        micro = largest_divisor(share, micro - 1)
    tokens = micro * job.spec.dataset.max_sequence_length
    bound = "memory" if micro < limit else "the token limit of a device"
    return micro, f"largest divisor of the {share} samples per rank and step within {bound} ({tokens} tokens)"


def _output_format(spec: FineTuneJobSpec) -> OutputFormat:
    if spec.output.format is not None:
        return spec.output.format
    return OutputFormat.FULL_MODEL if spec.method.type is MethodType.FULL else OutputFormat.ADAPTER


def _revision(spec: FineTuneJobSpec, model: ModelFacts | None) -> str | None:
    if spec.model.revision is not None:
        return spec.model.revision
    pinned = spec.model.uri.rpartition("@")[2] if "@" in spec.model.uri else None
    return pinned or (model.revision if model else None)


def _with_model(plan: Plan, spec: FineTuneJobSpec, facts: Facts) -> Plan:
    """Parameter counts, memory and the warnings that follow from them."""
    if facts.model is None:
        return plan
    counts = count_parameters(spec, facts.model)
    job = _Job(spec, facts, plan.processes_per_node, plan.strategy, counts)
    layout = job.layout(plan.micro_batch_size, plan.gradient_checkpointing)
    memory = estimate_memory(spec, facts, counts, layout)
    smaller = replace(layout, micro_batch_size=1, checkpointing=CheckpointingMode.FULL)
    warnings = [*plan.warnings, *fit_warnings(spec, facts, counts, layout, smaller)]
    return plan.model_copy(
        update={
            "parameters": counts,
            "memory_per_device": memory,
            "model_revision": plan.model_revision or facts.model.revision,
            "warnings": tuple(dict.fromkeys(warnings)),
        }
    )


def _with_steps(plan: Plan, spec: FineTuneJobSpec, dataset: DatasetFacts | None) -> Plan:
    """Step counts, as far as they are known: exact data, or ``maxSteps``."""
    samples = dataset.train_samples if dataset and dataset.exact else None
    if samples is None and spec.training.max_steps is None:
        return plan
    steps = total_steps(spec, samples or 0)
    given = spec.training.schedule.warmup_steps
    if given is not None and given > steps:
        raise SpecError(
            [
                Problem(
                    "spec.training.schedule.warmupSteps",
                    given,
                    f"must be at most the {steps} steps of the job",
                    f"use at most {steps}, or warmupFraction",
                )
            ]
        )
    warmup = warmup_steps(spec.training.schedule, steps)
    known = {decision.field for decision in plan.decisions}
    added = tuple(d for d in step_decisions(spec, warmup, steps) if d.field not in known)
    return plan.model_copy(
        update={
            "total_steps": steps,
            "steps_per_epoch": steps_per_epoch(spec, samples) if samples else None,
            "warmup_steps": warmup,
            "decisions": plan.decisions + added,
            "warnings": tuple(dict.fromkeys([*plan.warnings, *step_warnings(spec, dataset)])),
        }
    )
