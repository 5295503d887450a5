"""DistributedDataParallel: every rank holds the model; gradients are all-reduced once per step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from finetune_trainer.engines.base import TorchEngine


class DdpEngine(TorchEngine):
    def shard(self, layer: nn.Module) -> None:
        """Nothing is sharded."""

    def wrap(self) -> None:
        self.forward_module = self.module
        if self.context.world_size > 1:
            cuda = self.context.device.type == "cuda"
            self.forward_module = DistributedDataParallel(
                self.module,
                device_ids=[self.context.local_rank] if cuda else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                init_sync=False,  # every rank loaded the same bytes and seeded the same adapters
            )

    def synchronize_gradients(self, boundary: bool) -> AbstractContextManager[Any]:
        if boundary or not isinstance(self.forward_module, DistributedDataParallel):
            return nullcontext()
        return self.forward_module.no_sync()
