"""Which norms become torch's RMS normalisation, and that nothing but rounding changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from finetune_trainer.norms import use_torch_rms_norm

KINDS = [LlamaRMSNorm, Qwen3RMSNorm, MistralRMSNorm]


def results(norm: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradient of the input, gradient of the weight."""
    leaf = x.clone().requires_grad_()
    out = norm(leaf)
    loss = (out.float() * torch.linspace(-1.0, 2.0, out.numel()).view_as(out)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [leaf, norm.weight])]


def random_norm(kind: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    norm = kind(32, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm, torch.randn(2, 7, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_are_those_of_the_architecture(kind: Any) -> None:
    norm, x = random_norm(kind)
    expected = results(norm, x)
    assert use_torch_rms_norm(norm) == 1
    for ours, theirs in zip(results(norm, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bit_it_is_as_near_to_fp32_as_the_architecture(kind: Any) -> None:
    norm, x = random_norm(kind)
    norm, x = norm.to(torch.bfloat16), x.to(torch.bfloat16)
    exact_norm = kind(32, eps=1e-5)
    exact_norm.load_state_dict(norm.state_dict())
    exact, theirs = results(exact_norm, x.float()), results(norm, x)
    use_torch_rms_norm(norm)
    for ours, given, wanted in zip(results(norm, x), theirs, exact, strict=True):
        assert ours.dtype == given.dtype
        assert float((ours - wanted).norm()) <= 1.1 * float((given - wanted).norm())


def test_a_norm_that_adds_one_to_its_weight_stays_as_it_is() -> None:
    assert use_torch_rms_norm(nn.Sequential(GemmaRMSNorm(16))) == 0


def test_a_norm_with_another_epsilon_than_it_says_stays_as_it_is() -> None:
    class StrangeRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + 1e-3)

    assert use_torch_rms_norm(nn.Sequential(StrangeRMSNorm(16, eps=1e-6))) == 0
    assert use_torch_rms_norm(nn.Sequential(LlamaRMSNorm(16, eps=1e-6))) == 1


def test_a_model_on_the_meta_device_is_recognised() -> None:
    with torch.device("meta"):
        model = nn.Sequential(LlamaRMSNorm(16), LlamaRMSNorm(16), nn.LayerNorm(16))
    assert use_torch_rms_norm(model) == 2
    assert model[0].weight.device.type == "meta"


def test_an_input_of_another_type_than_the_weight_goes_the_architectures_way() -> None:
    norm = LlamaRMSNorm(16)
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    expected = norm(x)
    use_torch_rms_norm(norm)
    assert norm(x).dtype == expected.dtype == torch.float32
    assert torch.equal(norm(x), expected)


def test_under_autocast_the_output_is_what_matrix_products_would_cast_it_to() -> None:
    norm, x = random_norm(LlamaRMSNorm)
    linear = nn.Linear(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = linear(norm(x))
        use_torch_rms_norm(norm)
        assert norm(x).dtype == torch.bfloat16
        assert torch.equal(linear(norm(x)), expected)
