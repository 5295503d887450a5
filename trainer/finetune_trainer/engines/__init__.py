"""Distributed engines: DDP, FSDP2, DeepSpeed ZeRO. A new one is a small file here and a line below."""

from __future__ import annotations

from importlib import import_module

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec, StrategyType
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine

# Module and class: an engine's libraries cost seconds to import, so only the chosen one is loaded.
ENGINES: dict[StrategyType, tuple[str, str]] = {
    StrategyType.DDP: ("ddp", "DdpEngine"),
    StrategyType.FSDP: ("fsdp", "FsdpEngine"),
    StrategyType.DEEPSPEED: ("deepspeed", "DeepSpeedEngine"),
}


def make_engine(plan: Plan, spec: FineTuneJobSpec, context: RankContext) -> Engine:
    """The engine of the plan's resolved strategy."""
    module, name = ENGINES[plan.strategy.type]
    engine: type[Engine] = getattr(import_module(f"{__name__}.{module}"), name)
    return engine(plan, spec, context)
