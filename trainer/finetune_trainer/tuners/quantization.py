"""4-bit storage of frozen linear layers (Dettmers et al. 2023, arXiv:2305.14314) that any engine can shard.

bitsandbytes keeps the packed bytes in a tensor subclass and the block statistics beside it, so peers replicate them.
Here both are plain ``uint8`` parameters: FSDP2 and ZeRO-3 shard them like any weight and never cast them.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import nn
from torch.nn import functional as F

BLOCK = 64  # weights per absmax


class QuantizedLinear(bnb.nn.Linear4bit):
    """A frozen linear layer in NF4 or FP4. Recognised by PEFT as a bitsandbytes 4-bit layer.

    ``weight``: packed bytes (out * in / 2, 1) uint8; ``weight_absmax``: block statistics as bytes, uint8.
    Before ``quantize`` runs, ``weight`` is an empty (out, in) tensor on the meta device.
    """

    packed_4bit = True

    def __init__(self, linear: nn.Linear, quant_type: str, double: bool, compute_dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double,
            quant_type=quant_type,
            device="meta",
        )
        # bitsandbytes would repack the bytes in place in an eval-mode forward on AVX512-BF16 machines.
        self.support_avx512bf16_for_cpu = False
        self.quant_type, self.double = quant_type, double
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._small: dict[str, Any] = {}

    @torch.no_grad()
    def quantize(self, weight: torch.Tensor) -> None:
        """Store ``weight`` (out, in) in 4 bit on its own device."""
        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, compress_statistics=self.double, quant_type=self.quant_type
        )
        self._small = {"shape": state.shape, "dtype": state.dtype, "code": state.code}
        if state.nested:
            second = state.state2
            self._small |= {"offset": state.offset, "absmax2": second.absmax, "code2": second.code}
            self._small["blocksize2"] = second.blocksize
        self._small["absmax_dtype"] = state.absmax.dtype
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_absmax = nn.Parameter(state.absmax.contiguous().view(torch.uint8), requires_grad=False)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802
        """PEFT asks a layer with this name to dequantise itself (DoRA needs the weight's norm)."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (out, in) that training really uses, from the bytes as they are now."""
        small = self._small
        dtype = dtype or self.compute_dtype
        if not small:
            return self.weight.to(dtype)
        second = None
        if "absmax2" in small:
            second = QuantState(
                absmax=small["absmax2"], code=small["code2"], blocksize=small["blocksize2"], dtype=torch.float32
            )
        state = QuantState(
            absmax=self.weight_absmax.data.view(small["absmax_dtype"]),
            shape=small["shape"],
            dtype=dtype,
            blocksize=BLOCK,
            code=small["code"],
            quant_type=self.quant_type,
            offset=small.get("offset"),
            state2=second,
        )
        return dequantize_4bit(self.weight.data.view(-1, 1), state)

    @property
    def stored_bytes(self) -> int:
        """Packed bytes and statistics of the whole layer (not of a shard)."""
        small = self._small
        count = small["shape"].numel()
        absmax = -(-count // BLOCK) * torch.empty((), dtype=small["absmax_dtype"]).element_size()
        return (count + 1) // 2 + absmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), computed in ``compute_dtype``, returned in the dtype of ``x``."""
        dtype = self.compute_dtype or x.dtype
        return _FrozenLinear.apply(x.to(dtype), self).to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    """Matrix product with a weight that is dequantised anew in the backward pass.

    The function keeps the module, not the tensor: engines free gathered bytes after the forward pass and gather them
    again before the backward pass, and a kept tensor would hold every layer's bytes alive in between.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:  # type: ignore[override]
        ctx.layer, ctx.dtype = layer, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return F.linear(x, layer.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        with torch.autocast(gradient.device.type, enabled=False):
            return gradient @ ctx.layer.dequantize(ctx.dtype), None


def quantize_linears(parent: nn.Module, quant_type: str, double: bool, compute_dtype: torch.dtype) -> list[str]:
    """Replace every ``nn.Linear`` below ``parent`` (on the meta device); returns their names."""
    names = [name for name, module in parent.named_modules() if type(module) is nn.Linear]
    for name in names:
        parent.set_submodule(name, QuantizedLinear(parent.get_submodule(name), quant_type, double, compute_dtype))
    return names
