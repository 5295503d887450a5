"""``config.json`` and the safetensors index -> ModelFacts, without opening a weight file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.parameters import shape_of
from finetune_api.plan import ModelFacts

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2"})  # families whose configuration class ties unless told otherwise
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
_DEFAULT_HEAD_DIMENSION = {"gemma": 256, "gemma2": 256, "qwen3": 128}


def model_facts_from_config(config: Mapping[str, Any], index: Mapping[str, Any] | None = None) -> ModelFacts:
    """Facts of a model from its parsed ``config.json`` and ``model.safetensors.index.json``.

    A field of the wrong type counts as absent: facts steer estimates, the trainer judges the file itself.
    """
    text = config.get("text_config")
    values: Mapping[str, Any] = {**config, **text} if isinstance(text, Mapping) else config
    model_type = _text(values.get("model_type")) or "unknown"
    architectures = values.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    heads = _count(values.get("num_attention_heads")) or _count(values.get("n_head"))
    hidden = _count(values.get("hidden_size")) or _count(values.get("n_embd"))
    tied = values.get("tie_word_embeddings")
    dtype = _text(values.get("dtype")) or _text(values.get("torch_dtype"))
    facts = ModelFacts(
        architecture=_text(architecture) or "unknown",
        model_type=model_type,
        hidden_size=hidden,
        layers=_count(values.get("num_hidden_layers")) or _count(values.get("n_layer")),
        attention_heads=heads,
        key_value_heads=_count(values.get("num_key_value_heads")) or heads,
        head_dimension=_count(values.get("head_dim"))
        or _DEFAULT_HEAD_DIMENSION.get(model_type)
        or (hidden // heads if hidden and heads else None),
        intermediate_size=_count(values.get("intermediate_size")),
        vocabulary_size=_count(values.get("vocab_size")),
        maximum_positions=_count(values.get("max_position_embeddings")),
        tied_embeddings=tied if isinstance(tied, bool) else model_type in _TIED_BY_DEFAULT,
        attention_bias=model_type == "qwen2" or values.get("attention_bias") is True,
        mlp_bias=values.get("mlp_bias") is True,
        query_key_norm=model_type in {"qwen3", "olmo2"},
        experts=next((count for name in _EXPERT_FIELDS if (count := _count(values.get(name)))), 0),
        storage_dtype=dtype,
        weight_bytes=_weight_bytes(index),
    )
    return facts.model_copy(update=_parameter_count(facts))


def _parameter_count(facts: ModelFacts) -> dict[str, Any]:
    shape = shape_of(facts)
    if shape is not None:
        return {"parameter_count": shape.total, "parameter_count_exact": True}
    width = _BYTES.get(facts.storage_dtype or "")
    if facts.weight_bytes is None or width is None:
        return {}
    return {"parameter_count": facts.weight_bytes // width}


def _weight_bytes(index: Mapping[str, Any] | None) -> int | None:
    metadata = index.get("metadata") if index else None
    return _count(metadata.get("total_size")) if isinstance(metadata, Mapping) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _text(value: Any) -> str | None:
    return value.removeprefix("torch.") if isinstance(value, str) and value else None
