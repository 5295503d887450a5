"""Optimizers by name, and which rule each parameter follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune_api.spec import FineTuneJobSpec, OptimizerType, StrategyType
from finetune_trainer.engines.base import OptimizerFactory, ParameterRule
from finetune_trainer.tuners.base import Tuner


def parameter_rules(model: nn.Module, tuner: Tuner, spec: FineTuneJobSpec) -> dict[str, ParameterRule]:
    """Name -> rule, from full shapes: no weight decay on vectors (biases, norms, magnitudes) unless asked for."""
    optimizer = spec.training.optimizer
    return {
        name: ParameterRule(
            weight_decay=optimizer.weight_decay if parameter.ndim >= 2 or optimizer.decay_bias_and_norm else 0.0,
            learning_rate_ratio=tuner.learning_rate_ratio(name),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def optimizer_factory(spec: FineTuneJobSpec, strategy: StrategyType) -> OptimizerFactory:
    """A function from parameter groups to the optimizer of ``spec.training.optimizer``."""
    build = _BUILDERS[spec.training.optimizer.type]
    learning_rate = spec.training.learning_rate

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build(spec, strategy, [{**group, "lr": learning_rate * group["ratio"]} for group in groups])

    return make


def _adamw(spec: FineTuneJobSpec, strategy: StrategyType, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    o = spec.training.optimizer
    fused = {"fused": True} if strategy is not StrategyType.FSDP else {"foreach": True}
    return torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.epsilon, **fused)


def _adamw_8bit(spec: FineTuneJobSpec, _strategy: StrategyType, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    o = spec.training.optimizer
    return AdamW8bit(groups, betas=(o.beta1, o.beta2), eps=o.epsilon)


def _paged_adamw_8bit(
    spec: FineTuneJobSpec, _strategy: StrategyType, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    from bitsandbytes.optim import PagedAdamW8bit

    o = spec.training.optimizer
    return PagedAdamW8bit(groups, betas=(o.beta1, o.beta2), eps=o.epsilon)


def _sgd(spec: FineTuneJobSpec, _strategy: StrategyType, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=spec.training.optimizer.momentum, foreach=True)


def _adafactor(spec: FineTuneJobSpec, _strategy: StrategyType, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=spec.training.learning_rate)


_BUILDERS: dict[OptimizerType, Callable[..., torch.optim.Optimizer]] = {
    OptimizerType.ADAMW: _adamw,
    OptimizerType.ADAMW_8BIT: _adamw_8bit,
    OptimizerType.PAGED_ADAMW_8BIT: _paged_adamw_8bit,
    OptimizerType.SGD: _sgd,
    OptimizerType.ADAFACTOR: _adafactor,
}
