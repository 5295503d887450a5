"""LoRA's forward and backward in one function: the same mathematics as PEFT's layer with fewer passes over activations.

PEFT casts the input to the adapter's type and back, keeps that copy for the backward pass, and writes the scaled
product and the sum as tensors of their own. Here the input is kept once (all adapted layers that read it share it), the
product is added into the base layer's output by the matrix product itself, and only the rank-wide inner product is kept
besides.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional as F

from finetune_trainer.tuners.quantization import QuantizedLinear


def fuse(model: nn.Module, adapter: str, in_place: bool) -> int:
    """Replace the forward of every plain LoRA layer below ``model``; returns how many.

    ``in_place``: add into the base layer's output. Not under selective checkpointing, which keeps that very tensor.
    Layers with dropout, DoRA, a bias in the adapter or another base layer stay PEFT's.
    """
    layers: list[Any] = [module for module in model.modules() if _is_plain(module, adapter)]
    for layer in layers:
        layer.forward = types.MethodType(_forward(layer.forward, adapter, in_place), layer)
    return len(layers)


def _is_plain(module: nn.Module, adapter: str) -> bool:
    if type(module) not in (Linear, Linear4bit) or adapter not in module.lora_A:
        return False
    base = module.get_base_layer()
    return (
        type(base) in (nn.Linear, QuantizedLinear)
        and not base.weight.requires_grad
        and list(module.lora_A) == [adapter]
        and adapter not in module.lora_variant
        and isinstance(module.lora_dropout[adapter], nn.Identity)
        and module.lora_B[adapter].bias is None
        and not module.fan_in_fan_out
    )


def _forward(original: Any, adapter: str, in_place: bool) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base, dtype = self.get_base_layer(), _autocast_type(x)
        if args or kwargs or self.merged or self.disable_adapters or not _computes_in(base, dtype):
            return original(x, *args, **kwargs)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return _LoraLinear.apply(x.to(dtype), a, b, base, float(self.scaling[adapter]), in_place)

    return forward


class _LoraLinear(torch.autograd.Function):
    """``x W^T + b + scaling (x A^T) B^T`` with a frozen base. x: (..., in), A: (r, in), B: (out, r) -> (..., out).

    The function keeps the base layer, not its weight: engines free gathered weights after the forward pass and gather
    them again before the backward pass; a 4-bit weight is dequantised anew.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: Any, scaling: float, in_place: bool
    ) -> torch.Tensor:
        dtype = x.dtype
        flat = x.reshape(-1, x.shape[-1])  # (T, in)
        with torch.autocast(x.device.type, enabled=False):
            inner = flat @ a.to(dtype).t()  # (T, r)
            bias = None if base.bias is None else base.bias.to(dtype)
            out = F.linear(flat, _weight(base, dtype), bias)
            add = out.addmm_ if in_place else out.addmm
            out = add(inner, b.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, inner, a, b)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        flat, inner, a, b = ctx.saved_tensors
        dtype = flat.dtype
        grad = gradient.reshape(-1, gradient.shape[-1]).to(dtype)  # (T, out)
        grad_x = None
        with torch.autocast(gradient.device.type, enabled=False):
            grad_inner = (grad @ b.to(dtype)).mul_(ctx.scaling)  # (T, r)
            grad_a = grad_inner.t() @ flat
            grad_b = (grad.t() @ inner).mul_(ctx.scaling)
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _weight(ctx.base, dtype)
                grad_x = grad_x.addmm_(grad_inner, a.to(dtype)).view(ctx.shape)
        return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None


def _autocast_type(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _computes_in(base: Any, dtype: torch.dtype) -> bool:
    """A 4-bit layer may have a type of its own (``computeType``); its adapter then keeps the input's type."""
    return not isinstance(base, QuantizedLinear) or base.compute_dtype in (None, dtype)


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    weight: torch.Tensor = base.dequantize(dtype) if isinstance(base, QuantizedLinear) else base.weight.to(dtype)
    return weight
