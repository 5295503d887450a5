"""The plan as a screen of text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from finetune_api.plan import MemoryEstimate, Plan
from finetune_api.quantities import format_bytes

_MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


def plan_screen(title: str, plan: Plan, width: int = 100) -> str:
    """What will run, what was chosen and why, and what to beware of."""
    lines = [title, ""]
    lines += [f"  {name:<13} {value}" for name, value in _rows(plan)]
    if plan.memory_per_device is not None:
        lines += ["", *_memory(plan.memory_per_device)]
    if plan.decisions:
        lines += ["", "chosen for you", *_decisions(plan)]
    for warning in plan.warnings:
        lines += ["", *textwrap.wrap(f"warning: {warning}", width, subsequent_indent="  ")]
    return "\n".join(lines)


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    nodes = f"{plan.nodes} node" + ("s" if plan.nodes > 1 else "")
    ranks = f"{plan.world_size} rank" + ("s" if plan.world_size > 1 else "")
    yield "runs on", f"{ranks} ({nodes} x {plan.processes_per_node}, {plan.device})"
    yield "strategy", plan.strategy.label
    yield "method", f"{plan.method.value} in {plan.precision.value}"
    yield (
        "batch",
        f"{plan.global_batch_size} per step = {plan.micro_batch_size} per forward x"
        f" {plan.gradient_accumulation_steps} accumulated x {ranks}",
    )
    yield "checkpointing", f"{plan.gradient_checkpointing.value} (activations)"
    yield "steps", _steps(plan)
    if plan.parameters is not None:
        counts = plan.parameters
        about = "" if counts.exact else "about "
        share = 100 * counts.trainable / counts.total if counts.total else 0.0
        quantized = f", {counts.quantized:,} of them in 4 bit" if counts.quantized else ""
        yield "parameters", f"{about}{counts.total:,}{quantized}; {counts.trainable:,} trained ({share:.2f} %)"
    yield "output", f"{plan.output_format.value} to {plan.artifact_prefix}"


def _steps(plan: Plan) -> str:
    if plan.total_steps is None:
        return "known once the data is prepared"
    epoch = f", {plan.steps_per_epoch:,} per epoch" if plan.steps_per_epoch else ""
    warmup = f", {plan.warmup_steps:,} of them warm-up" if plan.warmup_steps else ""
    return f"{plan.total_steps:,}{epoch}{warmup}"


def _memory(memory: MemoryEstimate) -> Iterator[str]:
    parts = [(name, getattr(memory, name)) for name in _MEMORY_PARTS]
    listed = ", ".join(f"{name} {format_bytes(amount)}" for name, amount in parts if amount)
    yield f"  {'memory':<13} {format_bytes(memory.total)} per device ({listed})"
    if memory.host:
        yield f"  {'':<13} and {format_bytes(memory.host)} of host memory per rank"


def _decisions(plan: Plan) -> Iterator[str]:
    field_width = max(len(decision.field) for decision in plan.decisions)
    value_width = min(28, max(len(decision.value) for decision in plan.decisions))
    for decision in plan.decisions:
        yield f"  {decision.field:<{field_width}}  {decision.value:<{value_width}}  {decision.reason}"
