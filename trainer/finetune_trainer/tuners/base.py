"""What a fine-tuning method has to say about itself; one small file per method, one line in the registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from finetune_api.spec import FineTuneJobSpec


def is_packed(module: nn.Module) -> bool:
    """Whether a layer is stored in 4 bit (``quantization.QuantizedLinear``), told without importing bitsandbytes."""
    return getattr(module, "packed_4bit", False)


class Tuner(ABC):
    """Decides which parameters exist and which of them learn. Works on a model whose parameters are on ``meta``."""

    def __init__(self, spec: FineTuneJobSpec, compute_dtype: torch.dtype) -> None:
        self.spec = spec
        self.compute_dtype = compute_dtype

    @abstractmethod
    def apply(self, model: Any) -> None:
        """Insert adapters, replace layers, set ``requires_grad``. Raises ModelError for targets that do not exist."""

    def owns(self, name: str) -> bool:  # noqa: ARG002
        """Whether a parameter is the method's own and so not in the base checkpoint."""
        return False

    def source_name(self, name: str) -> str:
        """The base checkpoint's name of a parameter of the tuned model."""
        return name

    def initialize(self, layer: nn.Module, name: str) -> None:  # noqa: B027
        """Fill own parameters below ``layer`` (its base weights are loaded, on their device, unsharded)."""

    def learning_rate_ratio(self, name: str) -> float:  # noqa: ARG002
        """Multiplier of the learning rate for one parameter."""
        return 1.0

    @abstractmethod
    def quantized_layers(self, model: nn.Module) -> list[str]:
        """Names of layers stored in 4 bit."""
