"""Attention over rows of concatenated segments: each sample attends to itself only, without padding or a dense mask.

Registered with transformers under the name ``segmented``; a micro-batch is one row (1, T) and the segment boundaries
travel as ``cu_seq_lens_q`` (transformers' own keyword), so activation checkpointing recomputes with the same ones.
CUDA in 16 bit uses torch's variable-length flash kernel; elsewhere, and where that kernel cannot compute what the layer
asks for, one SDPA call per segment, which is the reference.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from finetune_api.errors import ModelError

IMPLEMENTATION = "segmented"
computed_in: set[tuple[str, torch.dtype]] = set()  # kernels that attention really ran in and their types
_WIDEST_HEAD = 256
_FIRST_CAPABILITY = (8, 0)  # Ampere; flash attention has no kernels for older devices
# Keywords through which some architectures change the softmax itself; computing without them would be silently wrong.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "sinks")


def register() -> None:
    """Make ``attn_implementation="segmented"`` known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, segmented_attention)


def segmented_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, K, T, D)
    value: torch.Tensor,  # (1, K, T, D)
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,  # (S + 1,) int32
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:  # (1, T, H, D)
    """transformers' attention interface. Raises ModelError for architectures whose softmax differs."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(
                f"model {type(module).__name__}: its attention needs '{name}', which packed attention does not compute;"
                " choose a base model without it"
            )
    if attention_mask is not None or cu_seq_lens_q is None or query.shape[0] != 1:
        raise ModelError(
            f"model {type(module).__name__}: it does not hand segment boundaries to its attention; "
            "choose a base model whose layers pass attention keywords through"
        )
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # rotary tables in fp32 promote queries and keys, not values
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if dropout == 0.0 and _on_flash_hardware(query) and varlen_computes(query, scaling, sliding_window):
        attend: Callable[..., torch.Tensor] = _attend_varlen
        computed_in.add(("varlen flash", query.dtype))
    else:
        attend = functools.partial(_attend_per_segment, dropout=dropout)
        computed_in.add(("sdpa per segment", query.dtype))
    out = attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return out, None


def _attend_per_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int | None,  # noqa: ARG001  (same signature as the varlen kernel)
    scaling: float | None,
    sliding_window: int | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    gqa = query.shape[1] != key.shape[1]
    edges = boundaries.tolist()
    outputs = []
    for start, end in itertools.pairwise(edges):
        length = end - start
        mask = None
        if sliding_window is not None and length > sliding_window:
            position = torch.arange(length, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < sliding_window)  # (t, t)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=gqa,
            )
        )
    merged = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return merged.transpose(1, 2)


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    longest: int | None,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    parameters = varlen_parameters()
    if k.shape[1] != q.shape[1] and "enable_gqa" not in parameters:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    extra: dict[str, object] = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in parameters else {}
    if "scale" in parameters:
        extra["scale"] = scaling
    if "window_size" in parameters:
        extra["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    else:
        extra["is_causal"] = True
    longest = longest if longest is not None else int((boundaries[1:] - boundaries[:-1]).max())
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **extra).unsqueeze(0)


def varlen_computes(query: torch.Tensor, scaling: float | None, sliding_window: int | None) -> bool:
    """Whether this torch's kernel knows the head size, the scale and the window (torch 2.9 has neither of the two)."""
    parameters = varlen_parameters()
    width = query.shape[-1]
    return (
        bool(parameters)
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= _WIDEST_HEAD
        and ("scale" in parameters or scaling is None or math.isclose(scaling, width**-0.5))
        and ("window_size" in parameters or sliding_window is None)
    )


def _on_flash_hardware(query: torch.Tensor) -> bool:
    return query.device.type == "cuda" and _capability(query.device) >= _FIRST_CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def varlen_parameters() -> frozenset[str]:
    """Names of what ``varlen_attn`` takes; empty where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)
