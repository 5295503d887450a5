"""Short ways to a valid spec and to facts, for tests of the api."""

from __future__ import annotations

from typing import Any

from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import ModelFacts
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity
from finetune_api.validation import parse_spec

JOB = JobIdentity(namespace="team", name="job", uid="0001")
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def data(**blocks: Any) -> dict[str, Any]:
    """The smallest spec as plain data, with whole blocks replaced or added."""
    return {
        "model": {"uri": "s3://models/base/"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://adapters/team"},
        **blocks,
    }


def spec(**blocks: Any) -> FineTuneJobSpec:
    """A valid spec."""
    return parse_spec(data(**blocks))


def gpus(count: int = 1, memory: str | None = "80Gi") -> dict[str, Any]:
    """A ``resources`` block."""
    return {"accelerator": {"count": count, **({"memory": memory} if memory else {})}}


def llama_8b() -> ModelFacts:
    """Facts of an eight-billion-parameter Llama."""
    return model_facts_from_config(LLAMA_8B)
