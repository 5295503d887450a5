"""Checkpoints whose tensors transformers fuses (experts) are converted whole, and refused when they are not whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.errors import ModelError
from finetune_trainer.model import build_skeleton
from finetune_trainer.weights import WeightSource, pretrained_source


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def mixtral(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, **heads, tie_word_embeddings=request.param)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def source(directory: Path) -> WeightSource:
    return pretrained_source(directory, build_skeleton(directory, torch.float32, False), torch.float32, False)


def remove(directory: Path, word: str) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if word in name)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_fused_experts_are_what_transformers_makes_of_them(mixtral: Path) -> None:
    from transformers import MixtralForCausalLM

    weights = source(mixtral)
    assert weights.description == "whole model converted by transformers (its tensors need renaming or fusing)"
    expected = MixtralForCausalLM.from_pretrained(mixtral, dtype=torch.float32)
    experts = "model.layers.1.mlp.experts"
    found = weights.fill(torch.nn.Module(), {"gate_up_proj": f"{experts}.gate_up_proj"})
    assert torch.equal(found["gate_up_proj"], expected.get_submodule(experts).gate_up_proj)


def test_a_lacking_tensor_is_not_started_at_random(mixtral: Path) -> None:
    remove(mixtral, "layers.1.self_attn.k_proj")
    with pytest.raises(ModelError) as caught:
        source(mixtral)
    sentence = str(caught.value)
    assert sentence.startswith(f"{mixtral}: its safetensors lack 1 of the model's ")
    assert sentence.endswith(
        " tensors, first 'model.layers.1.self_attn.k_proj.weight'; config.json and weights do not belong together"
    )


def test_a_lacking_expert_is_refused(mixtral: Path) -> None:
    remove(mixtral, "experts.0.")
    with pytest.raises(ModelError) as caught:
        source(mixtral)
    assert str(caught.value).startswith(f"{mixtral}: transformers cannot convert its safetensors (")
    assert str(caught.value).endswith("; config.json and weights do not belong together")
