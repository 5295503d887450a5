"""RMS normalisation through torch's own function: one kernel each way on CUDA, the same operations on CPU.

Architectures write the formula out, which costs a pass over memory in fp32 for each of its seven operations.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon")


def use_torch_rms_norm(model: nn.Module) -> int:
    """Replace the forward of every norm that computes plain RMS normalisation; returns how many.

    Which ones do is found out by computing, class by class, on random numbers: some architectures add one to the
    weight, or normalise otherwise. The model may still be on the meta device.
    """
    plain: dict[tuple[Any, ...], bool] = {}
    replaced = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        kind = (type(module), tuple(module.weight.shape), epsilon)  # type: ignore[arg-type]
        if kind not in plain:
            plain[kind] = _is_plain(module, epsilon)
        if plain[kind]:
            module.forward = types.MethodType(_forward(module.forward, epsilon), module)
            replaced += 1
    return replaced


def _epsilon(module: nn.Module) -> float | None:
    weight = module._parameters.get("weight")
    if not type(module).__name__.endswith("RMSNorm") or list(module._parameters) != ["weight"] or weight is None:
        return None
    found = [getattr(module, name) for name in _EPSILON_NAMES if isinstance(getattr(module, name, None), float)]
    return found[0] if len(found) == 1 and weight.ndim == 1 else None


@torch.no_grad()
def _is_plain(module: nn.Module, epsilon: float) -> bool:
    shape = module.weight.shape
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*size, generator=generator) for size in (shape, (3, *shape)))  # type: ignore[misc]
    x *= epsilon**0.5 * torch.tensor([[1.0], [3.0], [1e4]])  # so that the epsilon counts
    try:
        given = functional_call(module, {"weight": weight}, (x,))
    except (TypeError, ValueError):  # called with more than the hidden states
        return False
    return torch.is_tensor(given) and torch.allclose(given, F.rms_norm(x, shape, weight, epsilon), rtol=1e-5, atol=1e-7)


def _forward(original: Any, epsilon: float) -> Any:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or self.weight.dtype != x.dtype:
            return original(x, *args, **kwargs)  # type: ignore[no-any-return]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            # every product that reads it would cast it to autocast's type, and keep a copy of its own
            return F.rms_norm(x, self.weight.shape, self.weight, epsilon).to(dtype)

    return forward
