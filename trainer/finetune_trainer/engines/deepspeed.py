"""DeepSpeed ZeRO-1/2/3 with optimizer and parameter offload.

Under ZeRO-3 each layer is partitioned right after it is filled, so no rank ever holds the whole model. Optimizer state
leaves and enters as full named tensors, so a checkpoint does not depend on the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune_api.spec import DeepSpeedOptions, Offload, Precision
from finetune_trainer.engines.base import Engine, OptimizerFactory, ParameterRule, State
from finetune_trainer.model import CausalLMForTraining, LossOutput


class DeepSpeedEngine(Engine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.context.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        self._seen_gradients: set[str] = set()
        self.deepspeed = deepspeed
        # would be compiled at run time: a pod has no compiler and a read-only root; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        self.stage = self.plan.strategy.zero_stage or 2
        self.configuration = self._configuration()

    def _configuration(self) -> dict[str, Any]:
        plan, strategy, spec = self.plan, self.plan.strategy, self.spec
        options = spec.distributed.strategy.deepspeed or DeepSpeedOptions()
        cuda = self.context.device.type == "cuda"
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": cuda,
            "memory_efficient_linear": False,  # would replace torch's linear for the whole process
        }
        for key, where in (
            ("offload_optimizer", strategy.offload_optimizer),
            ("offload_param", strategy.offload_parameters),
        ):
            if where is not Offload.NONE:
                zero[key] = {"device": where.value.lower(), "pin_memory": cuda}
                if where is Offload.NVME:
                    zero[key]["nvme_path"] = os.environ.get("FINETUNE_NVME_PATH", os.environ.get("TMPDIR", "/tmp"))
        extra = dict(options.configuration)
        zero.update(extra.pop("zero_optimization", {}))
        return {
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "zero_optimization": zero,
            "gradient_clipping": spec.training.max_gradient_norm or 0.0,
            "bf16": {"enabled": plan.precision is Precision.BF16},
            "fp16": {"enabled": plan.precision is Precision.FP16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            **extra,
        }

    def shard(self, layer: nn.Module) -> None:
        if self.stage == 3:
            self._partition(layer)

    def _partition(self, module: nn.Module) -> None:
        # ZeRO-3 leaves partitioned parameters in the type they have, and the engine skips them: cast first
        for parameter in module.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.compute_dtype)
        self.deepspeed.zero.Init(module=module, config_dict_or_path=self.configuration)

    def setup(
        self, module: CausalLMForTraining, rules: dict[str, ParameterRule], make_optimizer: OptimizerFactory
    ) -> None:
        self.module = module
        if self.stage == 3:
            self._partition(module)
        for name, parameter in self.trainable():
            parameter.register_hook(lambda _gradient, name=name: self._seen_gradients.add(name))
        optimizer = make_optimizer(self.parameter_groups(rules))
        self.engine, *_ = self.deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.configuration, dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self.forgive_smallest_scale()

    def forgive_smallest_scale(self) -> None:
        """DeepSpeed ends a run with a bare Exception there; the loop does it in our words."""
        if scaler := self._scaler:
            scaler.raise_error_at_min_scale = False

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler; None where the precision needs none."""
        return self.zero.loss_scaler if self.plan.precision is Precision.FP16 else None

    def forward_backward(self, batch: Any, scale: float, boundary: bool) -> LossOutput:
        self.engine.set_gradient_accumulation_boundary(boundary)
        output: LossOutput = self.engine(batch)
        # ZeRO averages over ranks; the loop's scale asks for the sum
        self.engine.backward(output.loss * (scale * self.context.world_size), scale_wrt_gas=False)
        if not boundary:
            self.engine.step()
        return LossOutput(output.loss.detach(), output.correct)

    def step(self, maximum_norm: float | None) -> float:  # noqa: ARG002  (the configuration holds it)
        self.engine.step()
        self._seen_gradients.clear()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def may_skip(self) -> bool:
        return bool(self._scaler and self._scaler.cur_scale > self._scaler.min_scale)

    def evaluate(self, batch: Any, last_token: bool = False) -> Any:
        self.engine.eval()
        try:
            with torch.no_grad():
                return self.engine(batch, last_token=last_token)
        finally:
            self.engine.train()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = learning_rate * group["ratio"]

    def missing_gradients(self) -> list[str]:
        return [name for name, _ in self.trainable() if name not in self._seen_gradients]

    # -- state ------------------------------------------------------------------------------------------------------
    def export(self, name: str, parameter: nn.Parameter, keep: bool) -> State:  # noqa: ARG002
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        values: State = {"weight": safe_get_full_fp32_param(parameter)}
        for key in self._elementwise_keys():
            values[key] = safe_get_full_optimizer_state(parameter, key)
        if (steps := self._optimizer_steps()) is not None:
            values["step"] = steps
        return {key: value.detach().float().cpu().clone() for key, value in values.items()} if keep else {}

    def restore(self, states: Callable[[str], State]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        keys: list[str] = []
        for index, (name, parameter) in enumerate(self.trainable()):
            saved = states(name)
            if index == 0:
                keys = [key for key, value in saved.items() if key != "weight" and value.ndim > 0]
                self._create_optimizer_state(keys, saved.get("step"))
            for key in ["weight", *keys]:
                if self.stage == 3:
                    part = self._local_partition(parameter, saved[key])
                    if key == "weight":
                        safe_set_local_fp32_param(parameter, part)
                    else:
                        safe_set_local_optimizer_state(parameter, part, key)
                else:
                    parameter.set_full_hp_param(
                        saved[key].to(self.context.device), optim_state_key=None if key == "weight" else key
                    )

    def scaler_state(self) -> dict[str, float]:
        if (scaler := self._scaler) is None:
            return {}
        return {
            "scale": float(scaler.cur_scale),
            "goodSteps": scaler.cur_iter - scaler.last_overflow_iter - 1,  # what the other engines count
            "iteration": scaler.cur_iter,
            "lastOverflow": scaler.last_overflow_iter,
            "hysteresis": scaler.cur_hysteresis,
        }

    def load_scaler_state(self, state: dict[str, float]) -> None:
        if not state:
            return
        scaler, good_steps = self._scaler, int(state.get("goodSteps", 0))
        scaler.cur_scale = state["scale"]
        scaler.cur_iter = int(state.get("iteration", good_steps))
        scaler.last_overflow_iter = int(state.get("lastOverflow", -1))
        scaler.cur_hysteresis = int(state.get("hysteresis", scaler.delayed_shift))

    def _flat_partitions(self) -> list[torch.Tensor]:
        """The fp32 tensors that the inner optimizer updates on this rank."""
        if self.stage == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if hasattr(self.zero, "fp32_groups_flat_partition"):  # stage 1 in BF16 is an optimizer class of its own
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)

    def _elementwise_keys(self) -> list[str]:
        for flat in self._flat_partitions():
            state = self.zero.optimizer.state.get(flat, {})
            keys = [key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape]
            if keys:
                return sorted(keys)
        return []

    def _optimizer_steps(self) -> torch.Tensor | None:
        for flat in self._flat_partitions():
            steps = self.zero.optimizer.state.get(flat, {}).get("step")
            if steps is not None:
                return torch.as_tensor(steps, dtype=torch.float32)
        return None

    def _create_optimizer_state(self, keys: list[str], steps: torch.Tensor | None) -> None:
        """The state that the inner optimizer would create at its first step, so that it can be written to."""
        for flat in self._flat_partitions():
            state: dict[str, Any] = {key: torch.zeros_like(flat) for key in keys}
            if steps is not None:
                state["step"] = steps.clone().to(flat.device)
            self.zero.optimizer.state[flat] = state
        if self.stage != 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _local_partition(self, parameter: nn.Parameter, full: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a full tensor, zero-padded as ZeRO-3 pads it."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = size * self.context.rank
        piece = full.flatten()[start : start + size]
        padded = torch.zeros(size, dtype=torch.float32, device=self.context.device)
        padded[: piece.numel()] = piece
        return padded
