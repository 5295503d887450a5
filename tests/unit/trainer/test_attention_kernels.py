"""Which kernel attention takes, for every torch that has a variable-length kernel, and how it is called."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from finetune_trainer import attention

TORCH_2_9 = frozenset({"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "is_causal", "return_aux"})


def query(width: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(1, 4, 10, width, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("width", "dtype", "computes"),
    [
        (16, torch.bfloat16, True),
        (128, torch.float16, True),
        (256, torch.bfloat16, True),
        (512, torch.bfloat16, False),
        (100, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_flash_takes_16_bit_heads_of_eights_up_to_256(width: int, dtype: torch.dtype, computes: bool) -> None:
    assert attention.varlen_computes(query(width, dtype), None, None) is computes


def test_without_scale_and_window_only_what_they_would_say_by_default_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "varlen_parameters", lambda: TORCH_2_9)
    assert attention.varlen_computes(query(64), None, None)
    assert attention.varlen_computes(query(64), 64**-0.5, None)
    assert not attention.varlen_computes(query(64), 0.25, None)  # would be ignored
    assert not attention.varlen_computes(query(64), None, 128)


def test_without_a_kernel_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_parameters", frozenset)
    assert not attention.varlen_computes(query(), None, None)


@pytest.mark.parametrize("window", [None, 4])
def test_this_torchs_kernel_accepts_the_call(window: int | None) -> None:
    with FakeTensorMode():
        q = torch.empty(1, 4, 10, 64, dtype=torch.bfloat16)
        k = torch.empty(1, 2, 10, 64, dtype=torch.bfloat16)
        boundaries = torch.tensor([0, 4, 10], dtype=torch.int32)
        out = attention._attend_varlen(q, k, k, boundaries, 6, 0.125, window)
    assert (tuple(out.shape), out.dtype) == ((1, 10, 4, 64), torch.bfloat16)


@pytest.mark.parametrize("parameters", [TORCH_2_9, frozenset(inspect.signature(varlen.varlen_attn).parameters)])
def test_the_kernel_is_asked_for_causal_attention(parameters: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def varlen_attn(q: Any, k: Any, _v: Any, *_sizes: Any, **extra: Any) -> torch.Tensor:
        calls.append((tuple(q.shape), tuple(k.shape), extra))
        return q

    monkeypatch.setattr(attention, "varlen_parameters", lambda: parameters)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    q, k = torch.randn(1, 4, 10, 8), torch.randn(1, 2, 10, 8)
    attention._attend_varlen(q, k, k, torch.tensor([0, 10], dtype=torch.int32), 10, None, None)
    if parameters is TORCH_2_9:  # no grouped heads: keys are repeated
        assert calls == [((10, 4, 8), (10, 4, 8), {"is_causal": True})]
    else:
        assert calls == [((10, 4, 8), (10, 2, 8), {"enable_gqa": True, "scale": None, "window_size": (-1, 0)})]
