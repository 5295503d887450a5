"""What the loop asks of a distributed engine. An engine is one file and one line in the registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec, Precision
from finetune_trainer.distributed import RankContext
from finetune_trainer.model import DTYPES, CausalLMForTraining, LossOutput

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ParameterRule:
    """How the optimizer treats one trainable parameter; decided on full shapes, before anything is sharded."""

    weight_decay: float
    learning_rate_ratio: float


class Engine(ABC):
    """Wraps the model, computes gradients over the global batch, steps, and gives out full tensors for checkpoints.

    Losses are sums; the loop passes ``scale`` so that gradients are those of the mean over the global batch's
    supervised tokens, whatever the split over ranks and micro-batches.
    """

    module: CausalLMForTraining

    def __init__(self, plan: Plan, spec: FineTuneJobSpec, context: RankContext) -> None:
        self.plan, self.spec, self.context = plan, spec, context
        self.compute_dtype = DTYPES[plan.precision]

    # -- building ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def shard(self, layer: nn.Module) -> None:
        """Called with each decoder layer right after it is filled, before the next one is."""

    @abstractmethod
    def setup(
        self, module: CausalLMForTraining, rules: dict[str, ParameterRule], make_optimizer: OptimizerFactory
    ) -> None:
        """Called once when every parameter is filled: shard the rest, create the optimizer."""

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(name in the bare model, parameter as the engine holds it), in a stable order."""
        return ((n, p) for n, p in self.module.model.named_parameters() if p.requires_grad)

    # -- one step ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def forward_backward(self, batch: Any, scale: float, boundary: bool) -> LossOutput:
        """Add the gradients of ``scale * loss``; ``boundary`` marks the last micro-batch of the step."""

    @abstractmethod
    def step(self, maximum_norm: float | None) -> float:
        """Clip to ``maximum_norm``, update, clear gradients. Returns the global norm before clipping; a non-finite
        norm is returned without updating when the precision scales losses (FP16), else after the caller's check."""

    def may_skip(self) -> bool:
        """Whether a non-finite norm now only means that the loss scale has to shrink (FP16, unless it is smallest)."""
        return False

    @abstractmethod
    def evaluate(self, batch: Any, last_token: bool = False) -> Any:
        """Forward only, without gradients and without dropout."""

    @abstractmethod
    def set_learning_rate(self, learning_rate: float) -> None:
        """The rate of this step before per-parameter ratios."""

    @abstractmethod
    def missing_gradients(self) -> list[str]:
        """Trainable parameters that got no gradient in the last backward pass (call before ``step``)."""

    # -- state ------------------------------------------------------------------------------------------------------
    @abstractmethod
    def export(self, name: str, parameter: nn.Parameter, keep: bool) -> State:
        """Full CPU tensors of one parameter: ``weight`` (fp32) and the optimizer's state under its own names.

        Collective: every rank calls it for every parameter in the same order; only ranks with ``keep`` get tensors.
        """

    @abstractmethod
    def restore(self, states: Callable[[str], State]) -> None:
        """Put optimizer state (and fp32 masters) back; weights were filled from the checkpoint already."""

    def scaler_state(self) -> dict[str, float]:
        """Loss scale of FP16, else empty."""
        return {}

    def load_scaler_state(self, state: dict[str, float]) -> None:  # noqa: B027
        """The inverse of ``scaler_state``."""

    # -- helpers shared by engines ----------------------------------------------------------------------------------
    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision: fp32 masters, matrix products in the compute dtype."""
        if self.plan.precision is Precision.FP32:
            return nullcontext()
        return torch.autocast(self.context.device.type, dtype=self.compute_dtype)

    def parameter_groups(self, rules: dict[str, ParameterRule]) -> list[dict[str, Any]]:
        """Optimizer groups, one per distinct rule; each keeps its ``ratio`` for the schedule."""
        groups: dict[ParameterRule, dict[str, Any]] = {}
        for name, parameter in self.trainable():
            rule = rules[name]
            group = groups.setdefault(
                rule, {"params": [], "weight_decay": rule.weight_decay, "ratio": rule.learning_rate_ratio}
            )
            group["params"].append(parameter)
        return list(groups.values())


class LossScaler:
    """Dynamic loss scale for FP16 (Micikevicius et al. 2018, arXiv:1710.03740)."""

    growth_interval = 2000
    smallest = 1.0

    def __init__(self, enabled: bool) -> None:
        self.scale = 2.0**16 if enabled else 1.0
        self.enabled = enabled
        self.good_steps = 0

    @property
    def may_shrink(self) -> bool:
        return self.enabled and self.scale > self.smallest

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2.0, self.smallest), 0
            return
        self.good_steps += 1
        if self.good_steps % self.growth_interval == 0:
            self.scale *= 2.0


class TorchEngine(Engine):
    """What DDP and FSDP2 share: a torch optimizer over named parameters, our loss scaler, clipping."""

    def setup(
        self, module: CausalLMForTraining, rules: dict[str, ParameterRule], make_optimizer: OptimizerFactory
    ) -> None:
        self.module = module
        self.wrap()
        self.scaler = LossScaler(self.plan.precision is Precision.FP16)
        self.optimizer = make_optimizer(self.parameter_groups(rules))
        self._updated = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}

    @abstractmethod
    def wrap(self) -> None:
        """Wrap ``self.module`` so that ``self.forward_module`` averages or reduces gradients."""

    forward_module: nn.Module

    def synchronize_gradients(self, boundary: bool) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Context for one micro-batch: reduce gradients only at the boundary."""
        return nullcontext()

    def forward_backward(self, batch: Any, scale: float, boundary: bool) -> LossOutput:
        with self.synchronize_gradients(boundary):
            with self.autocast():
                output: LossOutput = self.forward_module(batch)
            # both wrappers average over ranks; the loop's scale asks for the sum
            (output.loss * (scale * self.context.world_size * self.scaler.scale)).backward()
        return LossOutput(output.loss.detach(), output.correct)

    def step(self, maximum_norm: float | None) -> float:
        parameters = [p for _, p in self.trainable()]
        if self.scaler.scale != 1.0:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scaler.scale)
        norm = self.clip(parameters, math.inf if maximum_norm is None else maximum_norm)
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def may_skip(self) -> bool:
        return self.scaler.may_shrink

    def clip(self, parameters: list[nn.Parameter], maximum_norm: float) -> float:
        """Clip in place; the global L2 norm before clipping."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, maximum_norm))

    def evaluate(self, batch: Any, last_token: bool = False) -> Any:
        self.module.eval()
        try:
            with torch.no_grad(), self.autocast():
                return self.module(batch, last_token=last_token)
        finally:
            self.module.train()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["ratio"]

    def missing_gradients(self) -> list[str]:
        return [name for name, parameter in self.trainable() if parameter.grad is None]

    def export(self, name: str, parameter: nn.Parameter, keep: bool) -> State:
        # a gathered copy in its place would be exported without optimizer state, in the compute type
        assert id(parameter) in self._updated, f"{name} is not the parameter that the optimizer updates"
        values: State = {"weight": parameter.detach(), **_tensor_state(self.optimizer.state.get(parameter, {}))}
        full = {key: self.full_tensor(value) for key, value in values.items()}
        return {key: value.cpu().clone() for key, value in full.items()} if keep else {}

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def local_like(self, full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of a full tensor, laid out like ``parameter``."""
        return full.to(parameter.device)

    def restore(self, states: Callable[[str], State]) -> None:
        # a left-over gradient would make some optimizers skip state that is being put back
        self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.trainable():
            saved = {key: value for key, value in states(name).items() if key != "weight"}
            self._restore_one(parameter, saved)

    def _restore_one(self, parameter: nn.Parameter, saved: State) -> None:
        if hasattr(self.optimizer, "init_state"):  # bitsandbytes lays its (paged) state out itself
            for group_index, group in enumerate(self.optimizer.param_groups):
                for index, candidate in enumerate(group["params"]):
                    if candidate is parameter:
                        self.optimizer.init_state(group, parameter, group_index, index)
            for key, value in saved.items():
                present = self.optimizer.state[parameter].get(key)
                if torch.is_tensor(present):
                    present.copy_(value)
                else:
                    self.optimizer.state[parameter][key] = value.item()
            return
        self.optimizer.state[parameter] = {
            key: self.local_like(value, parameter)
            if value.shape == parameter.shape
            else self._small(key, value, parameter)
            for key, value in saved.items()
        }

    def _small(self, key: str, value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        capturable = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return value.to(parameter.device) if key != "step" or capturable else value

    def scaler_state(self) -> dict[str, float]:
        return {"scale": self.scaler.scale, "goodSteps": self.scaler.good_steps} if self.scaler.enabled else {}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if state:
            self.scaler.scale, self.scaler.good_steps = state["scale"], int(state.get("goodSteps", 0))


def _tensor_state(state: dict[str, Any]) -> State:
    return {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in state.items() if v is not None}
