"""Floating-point operations per token and the utilisation that follows; peak rates of known devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune_api.spec import MethodType

# Dense bf16 / fp16 peak, FLOP/s, from the vendors' datasheets (SXM parts).
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "B200": 2250e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit peak, or None where it is not known (CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), None)


class FlopCounter:
    """Model FLOPs of a step (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), recomputation not counted.

    Full: 6 per weight and token. LoRA and QLoRA: 4 per frozen weight (no weight gradient) and 6 per adapter weight.
    The input embedding does not multiply; the head does. Attention: 2 L s d forward per token, causal, times 3.
    """

    def __init__(self, model: nn.Module, method: MethodType, sizes: dict[str, int], trainable: set[str]) -> None:
        config: Any = model.config.get_text_config()  # type: ignore[attr-defined]
        embedding = model.get_input_embeddings().weight  # type: ignore[attr-defined]
        tied = model.get_output_embeddings().weight is embedding  # type: ignore[attr-defined]
        skipped = {n for n, p in model.named_parameters() if p is embedding and not tied}
        learning = sum(size for name, size in sizes.items() if name in trainable and name not in skipped)
        frozen = sum(size for name, size in sizes.items() if name not in trainable and name not in skipped)
        self.per_token = 6 * learning + (6 if method is MethodType.FULL else 4) * frozen
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.per_token_and_position = 6 * config.num_hidden_layers * width * config.num_attention_heads

    def step(self, segment_lengths_squared: float, tokens: int) -> float:
        """FLOPs of a step with ``tokens`` tokens and the given sum of squared segment lengths."""
        return self.per_token * tokens + self.per_token_and_position * segment_lengths_squared
