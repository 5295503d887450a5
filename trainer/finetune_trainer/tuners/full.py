"""Full fine-tuning: every parameter learns (catalogue row A1)."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune_trainer.tuners.base import Tuner


class FullTuner(Tuner):
    def apply(self, model: Any) -> None:
        model.requires_grad_(True)

    def quantized_layers(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        return []
