"""Distributed engines: DDP, FSDP2, DeepSpeed ZeRO. A new one is a small file here and a line below."""

from __future__ import annotations

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec, StrategyType
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine
from finetune_trainer.engines.ddp import DdpEngine
from finetune_trainer.engines.deepspeed import DeepSpeedEngine
from finetune_trainer.engines.fsdp import FsdpEngine

ENGINES: dict[StrategyType, type[Engine]] = {
    StrategyType.DDP: DdpEngine,
    StrategyType.FSDP: FsdpEngine,
    StrategyType.DEEPSPEED: DeepSpeedEngine,
}


def make_engine(plan: Plan, spec: FineTuneJobSpec, context: RankContext) -> Engine:
    """The engine of the plan's resolved strategy."""
    return ENGINES[plan.strategy.type](plan, spec, context)
