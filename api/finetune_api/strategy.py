"""Which engine runs the job, and why."""

from __future__ import annotations

from finetune_api.compatibility import REPLICATED_ONLY
from finetune_api.memory import Layout, estimate_memory, memory_budget
from finetune_api.parameters import count_parameters
from finetune_api.plan import CheckpointingMode, Facts, ResolvedStrategy
from finetune_api.quantities import format_bytes
from finetune_api.spec import DeepSpeedOptions, FineTuneJobSpec, FsdpOptions, Sharding, StrategyType

_SHARDING_LABELS = {
    Sharding.FULL: "FSDP full shard",
    Sharding.HYBRID: "FSDP hybrid shard",
    Sharding.GRADIENT_AND_OPTIMIZER: "FSDP gradient and optimizer shard",
}
DDP = ResolvedStrategy(type=StrategyType.DDP, label="DDP")


def fsdp(sharding: Sharding, cpu_offload: bool = False) -> ResolvedStrategy:
    """FSDP as the plan names it."""
    label = _SHARDING_LABELS[sharding] + (", CPU offload" if cpu_offload else "")
    return ResolvedStrategy(type=StrategyType.FSDP, label=label, sharding=sharding, cpu_offload=cpu_offload)


def deepspeed(options: DeepSpeedOptions) -> ResolvedStrategy:
    """DeepSpeed as the plan names it."""
    parts = [f"DeepSpeed ZeRO-{options.zero_stage}"]
    if options.offload_optimizer.value != "None":
        parts.append(f"optimizer on {options.offload_optimizer.value}")
    if options.offload_parameters.value != "None":
        parts.append(f"parameters on {options.offload_parameters.value}")
    return ResolvedStrategy(
        type=StrategyType.DEEPSPEED,
        label=", ".join(parts),
        zero_stage=options.zero_stage,
        offload_optimizer=options.offload_optimizer,
        offload_parameters=options.offload_parameters,
    )


def resolve_strategy(spec: FineTuneJobSpec, facts: Facts, processes_per_node: int) -> tuple[ResolvedStrategy, str]:
    """The strategy, and the reason where it was chosen for the user (else an empty string)."""
    asked = spec.distributed.strategy
    if asked.type is StrategyType.DDP:
        return DDP, ""
    if asked.type is StrategyType.FSDP:
        options = asked.fsdp or FsdpOptions()
        return fsdp(options.sharding, options.cpu_offload), ""
    if asked.type is StrategyType.DEEPSPEED:
        return deepspeed(asked.deepspeed or DeepSpeedOptions()), ""
    return _choose(spec, facts, processes_per_node)


def _choose(spec: FineTuneJobSpec, facts: Facts, processes_per_node: int) -> tuple[ResolvedStrategy, str]:
    nodes = spec.distributed.nodes
    world_size = nodes * processes_per_node
    if world_size == 1:
        return DDP, "one rank: there is nothing to shard"
    optimizer = spec.training.optimizer.type
    if optimizer in REPLICATED_ONLY:
        return DDP, f"optimizer {optimizer.value} works on whole tensors only"
    if facts.model is None or count_parameters(spec, facts.model) is None:
        return fsdp(Sharding.FULL), "the size of the model is not known yet, and full sharding fits the largest"
    budget = memory_budget(spec, processes_per_node)
    room = f"{format_bytes(budget.bytes)} usable per device{'' if budget.known else ' (assumed)'}"
    needed = _needed(spec, facts, DDP, processes_per_node)
    if needed <= budget.bytes:
        return DDP, f"a replica needs {format_bytes(needed)} of the {room}"
    reason = f"a replica needs {format_bytes(needed)}, more than the {room}"
    if nodes > 1 and processes_per_node > 1:
        hybrid = _needed(spec, facts, fsdp(Sharding.HYBRID), processes_per_node)
        if hybrid <= budget.bytes:
            return fsdp(Sharding.HYBRID), f"{reason}; sharded within each node it needs {format_bytes(hybrid)}"
    return fsdp(Sharding.FULL), reason


def _needed(spec: FineTuneJobSpec, facts: Facts, strategy: ResolvedStrategy, processes_per_node: int) -> int:
    """Bytes per device at the smallest micro-batch the user allows, with checkpointing where it is free to choose."""
    counts = count_parameters(spec, facts.model) if facts.model else None
    asked = spec.training.gradient_checkpointing.value
    layout = Layout(
        strategy=strategy,
        world_size=spec.distributed.nodes * processes_per_node,
        processes_per_node=processes_per_node,
        micro_batch_size=spec.training.micro_batch_size or 1,
        checkpointing=CheckpointingMode.FULL if asked == "Auto" else CheckpointingMode(asked),
    )
    estimate = estimate_memory(spec, facts, counts, layout)
    return estimate.total if estimate else 0
