"""The chunked head losses against torch's own cross entropy over the logits of the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finetune_trainer.losses.causal_lm import (
    HeadOptions,
    LogitTransform,
    chunk_length,
    install_head_loss,
    token_losses,
)

WIDTH = 12
VOCABULARY = 2**19  # 64 tokens a chunk
CHUNK = 64


class Bottleneck(nn.Module):
    """A head that is not one linear layer, as LoRA on ``lm_head`` is not."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, vocabulary, bias=False)
        self.down = nn.Linear(width, 3, bias=False)
        self.up = nn.Linear(3, vocabulary, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


def inputs(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(vocabulary, (rows,), generator=generator)


def direct(head: Any, hidden: torch.Tensor, labels: torch.Tensor, options: HeadOptions) -> tuple[torch.Tensor, int]:
    """All logits at once, torch's loss, torch's gradients."""
    logits = options.transform(head(hidden)).float()
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=options.label_smoothing)
    return loss, int((logits.argmax(-1) == labels).sum())


def compare(head: nn.Module, rows: int, vocabulary: int, options: HeadOptions, tolerance: float) -> None:
    """Loss, correct tokens and every gradient, scaled by a factor as the loop scales by 1 / tokens."""
    dtype = next(head.parameters()).dtype
    hidden, labels = inputs(rows, vocabulary, dtype)
    reference_head, reference_hidden = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    expected, expected_correct = direct(reference_head, reference_hidden, labels, options)
    (expected / rows).backward()

    install_head_loss(head, options)
    loss, correct = head(hidden, labels=labels)
    assert (loss.dtype, correct.dtype) == (torch.float32, torch.int64)
    (loss / rows).backward()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    assert abs(int(correct) - expected_correct) <= (0 if dtype is torch.float32 else rows // 20)
    gradients = {"hidden": (hidden.grad, reference_hidden.grad)}
    pairs = zip(head.named_parameters(), reference_head.parameters(), strict=True)
    gradients |= {name: (one.grad, other.grad) for (name, one), other in pairs}
    for name, (actual, wanted) in gradients.items():
        assert actual is not None, name
        assert wanted is not None, name
        assert actual.dtype == dtype, name
        scale = float(wanted.abs().max())
        assert scale > 0, name
        difference = float((actual.float() - wanted.float()).abs().max()) / scale
        assert difference <= tolerance, f"{name}: {difference}"


def test_a_chunk_keeps_within_its_logits_and_1024_tokens() -> None:
    assert [chunk_length(size) for size in (512, 2**15, 2**17, VOCABULARY, 2**22)] == [1024, 1024, 256, CHUNK, 16]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2500])
def test_the_fused_loss_and_its_gradients_are_torchs(rows: int, bias: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 300, bias=bias)
    compare(head, rows, 300, HeadOptions(label_smoothing=smoothing), 2e-6)


@pytest.mark.parametrize("rows", [CHUNK, CHUNK + 1])
def test_a_large_vocabulary_cuts_the_rows_into_short_chunks(rows: int) -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    compare(head, rows, VOCABULARY, HeadOptions(), 5e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_in_bf16_the_fused_loss_stays_near_torchs(smoothing: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 300, bias=True).to(torch.bfloat16)
    compare(head, 1500, 300, HeadOptions(label_smoothing=smoothing), 0.02)


def test_under_autocast_the_head_computes_in_16_bit_and_its_gradient_is_kept_in_32() -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 300, bias=False)
    hidden, labels = inputs(700, 300)
    exact, _ = direct(head, hidden, labels, HeadOptions())
    (expected,) = torch.autograd.grad(exact, head.weight)
    install_head_loss(head, HeadOptions())
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head(hidden, labels=labels)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype is torch.float32
    assert 0 < abs(loss.item() - exact.item()) <= 0.01 * exact.item()
    assert float((head.weight.grad - expected).norm() / expected.norm()) <= 0.02


TRANSFORMS = {
    "identity": LogitTransform(),
    "soft cap": LogitTransform(softcap=2.0),
    "scale": LogitTransform(scale=0.25),
    "scale and soft cap": LogitTransform(scale=3.0, softcap=5.0),
}


@pytest.mark.parametrize("rows", [1, 256, 257, 600])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_any_other_head_is_the_direct_computation_in_chunks(transform: str, rows: int) -> None:
    torch.manual_seed(0)
    compare(Bottleneck(WIDTH, 300), rows, 300, HeadOptions(0.1, TRANSFORMS[transform]), 2e-6)


@pytest.mark.parametrize("transform", ["soft cap", "scale", "scale and soft cap"])
def test_a_linear_head_with_a_transform_is_the_direct_computation(transform: str) -> None:
    torch.manual_seed(0)
    compare(nn.Linear(WIDTH, 300), 600, 300, HeadOptions(0.0, TRANSFORMS[transform]), 2e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, LogitTransform()),
        ({"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ({"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
        ({"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ({"lm_head_multiplier": 0.5}, LogitTransform(scale=0.5)),
    ],
)
def test_the_transform_is_read_from_the_names_that_configurations_use(
    settings: dict[str, Any], expected: LogitTransform
) -> None:
    from types import SimpleNamespace

    assert LogitTransform.of(SimpleNamespace(**settings)) == expected


@pytest.mark.parametrize("kind", ["fused", "chunked"])
def test_a_micro_batch_without_a_label_gives_zero_loss_and_zero_gradients(kind: str) -> None:
    head: nn.Module = nn.Linear(WIDTH, 300) if kind == "fused" else Bottleneck(WIDTH, 300)
    install_head_loss(head, HeadOptions(label_smoothing=0.1))
    hidden, labels = inputs(5, 300)
    loss, correct = head(hidden[:0], labels=labels[:0])
    loss.backward()
    assert (loss.item(), correct.item()) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["fused", "chunked"])
def test_correct_tokens_are_counted_over_all_chunks(kind: str) -> None:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(WIDTH, 300) if kind == "fused" else Bottleneck(WIDTH, 300)
    hidden, _ = inputs(2100, 300)
    labels = head(hidden).argmax(-1)
    labels[::3] = (labels[::3] + 1) % 300
    install_head_loss(head, HeadOptions())
    with torch.no_grad():
        _, correct = head(hidden, labels=labels)
    assert int(correct) == 1400


def test_a_frozen_head_gets_no_gradient_and_still_gives_one_to_the_layers_before() -> None:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 300, bias=False).requires_grad_(False)
    hidden, labels = inputs(50, 300)
    expected, _ = direct(head, hidden, labels, HeadOptions())
    (gradient,) = torch.autograd.grad(expected, hidden)
    install_head_loss(head, HeadOptions())
    loss, _ = head(hidden, labels=labels)
    loss.backward()
    assert head.weight.grad is None
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)


def test_calling_the_head_without_labels_still_gives_logits() -> None:
    head = nn.Linear(WIDTH, 30)
    hidden, _ = inputs(4, 30)
    expected = head(hidden)
    install_head_loss(head, HeadOptions())
    assert torch.equal(head(hidden), expected)


def test_token_losses_of_16_bit_logits_are_computed_in_32_bit() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    labels = torch.arange(6)
    expected = -torch.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(token_losses(logits, labels, 0.0), expected)
