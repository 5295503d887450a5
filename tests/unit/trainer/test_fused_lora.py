"""The fused LoRA function computes what PEFT's layer computes: outputs, gradients, under autocast and recomputation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.builders import build_model
from torch import nn

from finetune_trainer.tuners.fused_lora import fuse
from finetune_trainer.tuners.quantization import QuantizedLinear


class Block(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.proj = base
        self.config: dict[str, Any] = {"model_type": "block"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def tuned(kind: str, **options: Any) -> Block:
    """A block with one adapted layer, in 4 bit unless ``kind`` is linear; B is not zero."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 128)
    block: Any = Block(linear)
    if kind != "linear":
        with torch.device("meta"):
            empty = nn.Linear(64, 128)
        block.proj = QuantizedLinear(empty, "nf4", kind == "double", torch.float32)
        block.is_loaded_in_4bit = True
    block.requires_grad_(False)
    get_peft_model(block, LoraConfig(r=4, lora_alpha=12, target_modules=["proj"], **options))
    if kind != "linear":
        base = block.proj.get_base_layer()
        base.quantize(linear.weight.data)
        base.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    block.proj.lora_A["default"].weight = nn.Parameter(torch.randn(4, 64))
    block.proj.lora_B["default"].weight = nn.Parameter(torch.randn(128, 4))
    return block


def results(block: Any, x: torch.Tensor, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of A and B."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = block(x)
    weight = torch.linspace(-1.0, 1.0, out.numel()).view_as(out)
    (out.float() * weight).sum().backward()
    grads = [block.proj.lora_A["default"].weight.grad, block.proj.lora_B["default"].weight.grad]
    return [out.detach().float(), x.grad, *grads]  # type: ignore[list-item]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("kind", ["linear", "single", "double"])
def test_output_and_gradients_are_those_of_peft(kind: str, in_place: bool) -> None:
    block = tuned(kind)
    x = torch.randn(3, 5, 64)
    expected = results(block, x)
    assert fuse(block, "default", in_place) == 1
    for actual, wanted in zip(results(block, x), expected, strict=True):
        assert float((actual - wanted).norm() / wanted.norm()) < 1e-6


def test_under_autocast_it_is_at_least_as_near_to_fp32_as_peft() -> None:
    block = tuned("linear")
    x = torch.randn(40, 64)
    exact = results(block, x)
    theirs = results(block, x, torch.bfloat16)
    fuse(block, "default", in_place=True)
    ours = results(block, x, torch.bfloat16)
    for mine, peft, wanted in zip(ours, theirs, exact, strict=True):
        norm = wanted.norm()
        assert float((mine - wanted).norm() / norm) <= 1.1 * float((peft - wanted).norm() / norm)
        assert mine.dtype == peft.dtype


def test_a_four_bit_layer_with_a_type_of_its_own_stays_as_peft_computes_it() -> None:
    block: Any = tuned("double")
    block.proj.get_base_layer().compute_dtype = torch.bfloat16
    x = torch.randn(7, 64)
    expected = results(block, x)
    fuse(block, "default", in_place=True)
    assert all(torch.equal(a, e) for a, e in zip(results(block, x), expected, strict=True))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_dropout_dora_and_adapter_bias_stay_with_peft(options: dict[str, Any]) -> None:
    assert fuse(tuned("linear", **options), "default", in_place=True) == 0


def test_a_disabled_adapter_gives_the_base_layer() -> None:
    block: Any = tuned("linear")
    fuse(block, "default", in_place=True)
    x = torch.randn(2, 64)
    block.proj.enable_adapters(False)
    assert torch.equal(block(x), block.proj.get_base_layer()(x))


def test_only_the_input_and_the_inner_product_are_kept_for_the_backward_pass() -> None:
    block = tuned("linear")
    fuse(block, "default", in_place=True)
    x = torch.randn(50, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        block(x)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(4, 64), (50, 4), (50, 64), (128, 4)]
    assert next(t for t in kept if t.shape == (50, 64)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", ["Full", "Selective"])
def test_recomputation_gives_the_same_gradients(mode: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from finetune_api.plan import CheckpointingMode
    from finetune_trainer.loading import _checkpoint_activations

    plain = AutoModelForCausalLM.from_pretrained(build_model(tmp_path))
    plain.requires_grad_(False)
    get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    fused: Any = copy.deepcopy(plain)
    fuse(fused, "default", in_place=mode != "Selective")
    _checkpoint_activations(fused, CheckpointingMode(mode))
    ids = torch.arange(40).view(2, 20)
    gradients = []
    for model in (plain.train(), fused.train()):
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-6, msg=name)
