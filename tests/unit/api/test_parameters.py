"""Parameter counts from config.json equal those of the real model, built on the meta device, and of real PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_api.model_facts import model_facts_from_config
from finetune_api.parameters import count_parameters, known_architectures, shape_of
from finetune_api.plan import ModelFacts

from .specs import spec

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied, biased, wide heads": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 24,
    },
    "mistral": {"model_type": "mistral", "head_dim": 24},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3 by default": {"model_type": "qwen3"},
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma by default": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "head_dim": 32},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite"},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},
}
LORAS: dict[str, dict[str, Any]] = {
    "all-linear": {"rank": 4},
    "dora": {"rank": 4, "useDora": True},
    "modules to save": {"rank": 4, "modulesToSave": ["embed_tokens", "lm_head"]},
    "attention output": {"rank": 8, "targetModules": ["o_proj"]},
    "one layer by path": {"rank": 8, "targetModules": ["layers.1.self_attn.o_proj"]},
    "embeddings": {"rank": 8, "targetModules": ["embed_tokens", "o_proj"]},
    "head saved, attention adapted": {"rank": 2, "targetModules": ["o_proj"], "modulesToSave": ["lm_head"]},
}


def config_of(name: str) -> Any:
    values = {**_COMMON, **MODELS[name]}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def facts_of(config: Any) -> ModelFacts:
    return model_facts_from_config({"architectures": ["X"], **config.to_diff_dict(), "model_type": config.model_type})


def meta_model(config: Any) -> Any:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def test_every_known_architecture_is_compared() -> None:
    assert {values["model_type"] for values in MODELS.values()} == set(known_architectures())


@pytest.mark.parametrize("name", MODELS)
def test_the_count_equals_the_real_model(name: str) -> None:
    config = config_of(name)
    model = meta_model(config)
    counts = count_parameters(spec(method={"type": "Full"}), facts_of(config))
    assert counts is not None
    assert (counts.total, counts.trainable, counts.exact) == (model.num_parameters(), model.num_parameters(), True)


@pytest.mark.parametrize("name", MODELS)
def test_quantised_weights_are_the_linear_layers_of_the_decoder(name: str) -> None:
    config = config_of(name)
    layers = [m for n, m in meta_model(config).named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    counts = count_parameters(spec(method={"type": "QLoRA"}), facts_of(config))
    assert counts is not None
    assert counts.quantized == sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", ["llama", "llama tied, biased, wide heads", "qwen2", "qwen3", "phi3"])
def test_trainable_parameters_equal_those_of_peft(name: str, lora: str) -> None:
    config = config_of(name)
    options = LORAS[lora]
    targets: Any = options.get("targetModules", "all-linear")
    tuned = get_peft_model(
        meta_model(config),
        LoraConfig(
            task_type="CAUSAL_LM",
            r=options["rank"],
            target_modules=targets,
            modules_to_save=options.get("modulesToSave"),
            use_dora=options.get("useDora", False),
        ),
        low_cpu_mem_usage=True,
    )
    counts = count_parameters(spec(method={"type": "LoRA", "lora": options}), facts_of(config))
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tuned.parameters())
    assert counts is not None
    assert (counts.trainable, counts.total) == (trainable, total)


def test_an_unknown_architecture_is_not_guessed() -> None:
    facts = model_facts_from_config(
        {"architectures": ["NewForCausalLM"], "model_type": "new", "torch_dtype": "bfloat16", "hidden_size": 64},
        {"metadata": {"total_size": 2_000_000}},
    )
    counts = count_parameters(spec(method={"type": "Full"}), facts)
    assert shape_of(facts) is None
    assert counts is not None
    assert (counts.total, counts.exact) == (1_000_000, False)


def test_a_model_with_experts_is_not_counted_as_dense() -> None:
    facts = model_facts_from_config({**_COMMON, "model_type": "qwen3", "num_experts": 8})
    assert (facts.experts, shape_of(facts), facts.parameter_count_exact) == (8, None, False)


@pytest.mark.parametrize("broken", [{"hidden_size": "64"}, {"num_hidden_layers": -1}, {"vocab_size": True}, {}])
def test_a_strange_config_gives_facts_and_no_exception(broken: dict[str, Any]) -> None:
    assert not model_facts_from_config({"model_type": "llama", **broken}).parameter_count_exact
