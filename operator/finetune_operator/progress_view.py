"""What the launchers say, put together: one page of progress for the job, and a sentence for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api.plan import Plan
from finetune_api.report import Heartbeat, Phase, Progress
from finetune_api.status import (
    StatusCheckpoint,
    StatusDecision,
    StatusMemory,
    StatusPlan,
    StatusProgress,
)
from finetune_operator.sentences import as_sentence, cut, decimal, duration, enumeration, time_text, unix_time

PHASE_WORDS = {
    Phase.PREPARING_DATA: "preparing data",
    Phase.FETCHING_MODEL: "fetching the model",
    Phase.RENDEZVOUS: "the launchers are meeting",
    Phase.LOADING_MODEL: "loading the model",
    Phase.TRAINING: "training",
    Phase.EVALUATING: "evaluating",
    Phase.CHECKPOINTING: "writing a checkpoint",
    Phase.PUBLISHING: "publishing the artifact",
    Phase.DONE: "ending",
}
_ORDER = list(PHASE_WORDS)
STEPPING = {Phase.TRAINING, Phase.EVALUATING, Phase.CHECKPOINTING}


@dataclass(frozen=True)
class ProgressView:
    """The launchers' words about the job as a whole."""

    progress: StatusProgress
    message: str
    phase: Phase
    checkpoint: StatusCheckpoint | None
    plan: Plan | None
    has_steps: bool  # False: no rank has reached its first step yet, the numbers say nothing


def progress_view(pages: Sequence[Progress], nodes: int, now: datetime) -> ProgressView | None:
    """``None`` if no launcher answered. Any rank's heartbeat tells the step: a dead pod 0 does not hide the others."""
    if not pages:
        return None
    beats = [beat for page in pages for beat in page.ranks]
    slowest = min(pages, key=lambda page: (_ORDER.index(page.phase), page.node_rank))
    leader = min(beats, key=lambda beat: beat.rank) if beats else None
    plan = next((page.plan for page in pages if page.plan is not None), None)
    progress = _numbers(beats, leader, plan, now).model_copy(update={"phase": slowest.phase.value})
    message = _sentence(progress, slowest)
    silent = sorted(set(range(nodes)) - {page.node_rank for page in pages})
    if silent:
        names = enumeration([str(node) for node in silent])
        message += f"; node{'s' if len(silent) > 1 else ''} {names} {'do' if len(silent) > 1 else 'does'} not answer"
    has_steps = any(beat.step or beat.resumed_from_step is not None for beat in beats)
    return ProgressView(progress, message, slowest.phase, _checkpoint(beats), plan, has_steps)


def _numbers(beats: Sequence[Heartbeat], leader: Heartbeat | None, plan: Plan | None, now: datetime) -> StatusProgress:
    step = max((beat.step for beat in beats), default=0)
    total = max((beat.total_steps for beat in beats), default=0) or (plan.total_steps if plan else None)
    rate = next((beat.tokens_per_second for beat in beats if beat.tokens_per_second is not None), None)
    return StatusProgress(
        step=step,
        total_steps=total,
        epoch=decimal(leader.epoch) if leader and step else None,
        loss=decimal(leader.loss) if leader else None,
        validation_loss=decimal(leader.validation_loss) if leader else None,
        learning_rate=decimal(leader.learning_rate) if leader else None,
        tokens_per_second=round(rate) if rate is not None else None,
        eta_seconds=_eta(beats, step, total),
        updated_at=time_text(now),
    )


def _eta(beats: Sequence[Heartbeat], step: int, total: int | None) -> int | None:
    """Remaining steps at this attempt's mean step time; without a mean, at the last step's."""
    if not total:
        return None
    means = [beat.step_seconds_sum / sum(beat.step_seconds_counts) for beat in beats if sum(beat.step_seconds_counts)]
    seconds = max(means) if means else max((beat.step_seconds or 0.0 for beat in beats), default=0.0)
    return round(max(0, total - step) * seconds) if seconds > 0 else None


def _sentence(progress: StatusProgress, slowest: Progress) -> str:
    if slowest.phase in STEPPING and progress.step:
        return _stepping(progress, slowest.phase)
    words = PHASE_WORDS[slowest.phase]
    if slowest.message:
        words = f"{words}: {as_sentence(slowest.message)}"
    if slowest.done is not None and slowest.total:
        words += f" ({slowest.done:,.0f} of {slowest.total:,.0f})"
    return cut(words)


def _stepping(progress: StatusProgress, phase: Phase) -> str:
    parts = [f"step {progress.step:,}" + (f" of {progress.total_steps:,}" if progress.total_steps else "")]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,} tokens/s")
    if progress.eta_seconds is not None:
        parts.append(f"about {duration(progress.eta_seconds)} left")
    if phase != Phase.TRAINING:
        parts.append(PHASE_WORDS[phase])
    return ", ".join(parts)


def _checkpoint(beats: Sequence[Heartbeat]) -> StatusCheckpoint | None:
    named = [beat for beat in beats if beat.checkpoint_step is not None and beat.checkpoint_uri]
    newest = max(named, key=lambda beat: beat.checkpoint_step or 0, default=None)
    if newest is None:
        return None
    return status_checkpoint(newest.checkpoint_step or 0, newest.checkpoint_uri or "", newest.checkpoint_saved_at)


def status_checkpoint(step: int, uri: str, saved_at: float | None) -> StatusCheckpoint:
    """A checkpoint as the status names it."""
    saved = unix_time(saved_at or 0.0)
    return StatusCheckpoint(step=step, uri=cut(uri, 2048), saved_at=time_text(saved) if saved else None)


def status_plan(plan: Plan) -> StatusPlan:
    """What users see of a plan, within the bounds of the status."""
    memory = plan.memory_per_device
    return StatusPlan(
        world_size=plan.world_size,
        nodes=plan.nodes,
        strategy=cut(plan.strategy.label, 316),
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        total_steps=plan.total_steps,
        model_revision=cut(plan.model_revision, 64) if plan.model_revision else None,
        memory_per_device=StatusMemory.model_validate(memory.model_dump()) if memory else None,
        decisions=tuple(
            StatusDecision(field=cut(d.field, 316), value=cut(d.value, 316), reason=cut(d.reason))
            for d in plan.decisions[:64]
        ),
        warnings=tuple(cut(warning) for warning in plan.warnings[:32]),
    )
