"""FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over ranks, layer by layer.

Full shards over all ranks; Hybrid shards within a node and replicates over nodes; GradientAndOptimizer keeps the
gathered parameters between forward and backward (ZeRO-2's communication). 4-bit bytes are sharded as they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune_api.spec import MethodType, Precision, Sharding
from finetune_trainer.engines.base import TorchEngine


class FsdpEngine(TorchEngine):
    def shard(self, layer: nn.Module) -> None:
        reshard = self.plan.strategy.sharding is not Sharding.GRADIENT_AND_OPTIMIZER
        fully_shard(layer, reshard_after_forward=reshard, **self._options)

    def wrap(self) -> None:
        fully_shard(self.module, **self._options)
        self.forward_module = self.module

    @property
    def _options(self) -> dict[str, Any]:
        offload = CPUOffloadPolicy(pin_memory=self.context.device.type == "cuda")
        return {
            "mesh": self._mesh,
            "mp_policy": self._mixed_precision,
            "offload_policy": offload if self.plan.strategy.cpu_offload else OffloadPolicy(),
        }

    @property
    def _mixed_precision(self) -> MixedPrecisionPolicy:
        if self.plan.precision is Precision.FP32:
            return MixedPrecisionPolicy()
        if self.plan.method is MethodType.FULL:
            return MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        # Frozen weights are stored in the compute dtype, packed bytes must never be cast; autocast casts the adapters.
        return MixedPrecisionPolicy(reduce_dtype=torch.float32)

    @property
    def _mesh(self) -> DeviceMesh:
        if not hasattr(self, "_mesh_cache"):
            kind, world = self.context.device.type, self.context.world_size
            if self.plan.strategy.sharding is Sharding.HYBRID:
                per_node = self.plan.processes_per_node
                self._mesh_cache = init_device_mesh(
                    kind, (world // per_node, per_node), mesh_dim_names=("replicate", "shard")
                )
            else:
                self._mesh_cache = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        return self._mesh_cache

    def synchronize_gradients(self, boundary: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(boundary)
        return nullcontext()

    def evaluate(self, batch: Any, last_token: bool = False) -> Any:
        try:
            return super().evaluate(batch, last_token)
        finally:
            # without a backward pass the root, and layers that stay gathered until it, would remain in the compute
            # type: no longer what is stored. reshard() does not descend.
            for unit in self.module.modules():
                if isinstance(unit, FSDPModule):
                    unit.reshard()

    def clip(self, parameters: list[nn.Parameter], maximum_norm: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(parameters, maximum_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        if tensor.device.type != self.context.device.type:  # offloaded: collectives need the computing device
            tensor = tensor.to(self.context.device)
        return tensor.full_tensor()

    def local_like(self, full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        assert isinstance(parameter, DTensor)
        # every rank holds the full tensor: cut locally, no communication
        return distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
