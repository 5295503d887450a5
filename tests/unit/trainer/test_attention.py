"""Attention over concatenated segments against one dense block-diagonal causal mask."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune_api.errors import ModelError
from finetune_trainer import attention
from finetune_trainer.attention import segmented_attention

LENGTHS = (5, 1, 9, 16, 2)
TOTAL = sum(LENGTHS)
EDGES = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


class LlamaAttention(nn.Module):
    """Stands for the layer that calls; only its name is read."""


def tensors(heads: int, key_heads: int, width: int = 16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads * 10 + key_heads)
    shapes = [(1, heads, TOTAL, width), (1, key_heads, TOTAL, width), (1, key_heads, TOTAL, width)]
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"attention_mask": None, "cu_seq_lens_q": EDGES, "max_length_q": max(LENGTHS), **more}
    output, weights = segmented_attention(LlamaAttention(), query, key, value, **settings)
    assert weights is None
    return output


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float | None
) -> torch.Tensor:
    """(1, T, H, D) with the whole (T, T) mask."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    position = torch.arange(TOTAL)
    distance = position[:, None] - position[None, :]
    mask = (segment[:, None] == segment[None, :]) & (distance >= 0)
    if window is not None:
        mask &= distance < window
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_segments_are_a_block_diagonal_causal_mask(
    heads: int, key_heads: int, window: int | None, scale: float | None
) -> None:
    inputs = tensors(heads, key_heads)
    actual = attend(*inputs, sliding_window=window, scaling=scale)
    expected = dense(*inputs, window, scale)
    assert actual.shape == (1, TOTAL, heads, 16)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((actual * direction).sum(), inputs)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_what_one_segment_holds_changes_no_bit_of_another(changed: int, window: int | None) -> None:
    inputs = tensors(4, 2)
    before = attend(*inputs, sliding_window=window)
    part = slice(int(EDGES[changed]), int(EDGES[changed + 1]))
    other = [tensor.detach().clone() for tensor in inputs]
    for tensor in other:
        tensor[:, :, part] = 7.0 - 3.0 * tensor[:, :, part]
    after = attend(*other, sliding_window=window)
    outside = torch.ones(TOTAL, dtype=torch.bool)
    outside[part] = False
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.equal(before[:, part], after[:, part])


def test_autocast_brings_queries_keys_and_values_to_one_type_and_it_is_noted() -> None:
    query, key, value = tensors(4, 2)
    attention.computed_in.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value.to(torch.bfloat16))
    assert output.dtype is torch.bfloat16
    assert attention.computed_in == {("sdpa per segment", torch.bfloat16)}
    torch.testing.assert_close(output.float(), dense(query, key, value, None, None), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias", "sinks"])
def test_a_keyword_that_changes_the_softmax_is_refused(keyword: str) -> None:
    with pytest.raises(ModelError) as caught:
        attend(*tensors(4, 4), **{keyword: torch.ones(4)})
    assert str(caught.value) == (
        f"model LlamaAttention: its attention needs '{keyword}', which packed attention does not compute; "
        "choose a base model without it"
    )
    assert attend(*tensors(4, 4), **{keyword: None}).shape == (1, TOTAL, 4, 16)


@pytest.mark.parametrize(
    "broken",
    [
        {"cu_seq_lens_q": None},
        {"attention_mask": torch.ones(1, 1, TOTAL, TOTAL, dtype=torch.bool)},
    ],
)
def test_an_architecture_that_hands_over_no_boundaries_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        attend(*tensors(4, 4), **broken)
    assert str(caught.value) == (
        "model LlamaAttention: it does not hand segment boundaries to its attention; "
        "choose a base model whose layers pass attention keywords through"
    )
