"""Floating-point operations per token and the utilisation that follows; peak rates of known devices."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from finetune_api.spec import MethodType

# Dense bf16 / fp16 peak, FLOP/s, from the vendor's datasheets, by words of the device's name; the first match counts.
_PEAK_FLOPS = {
    ("B200",): 2250e12,
    ("H200",): 989e12,
    ("GH200",): 989e12,
    ("H100", "PCIe"): 756e12,
    ("H100", "NVL"): 835e12,
    ("H100",): 989e12,
    ("A100",): 312e12,
    ("L40S",): 362e12,
    ("L40",): 181e12,
    ("L4",): 121e12,
    ("A10G",): 70e12,
    ("A10",): 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense 16-bit peak, or None where it is not known (CPU)."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """The peak by a device's name: ``NVIDIA H100 80GB HBM3``."""
    words = set(re.split(r"[ -]", name))
    return next((peak for key, peak in _PEAK_FLOPS.items() if words.issuperset(key)), None)


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
