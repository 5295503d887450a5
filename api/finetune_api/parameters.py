"""How many parameters a model has, computed from ``config.json`` alone.

A known architecture is described by the modules of one decoder layer; everything else (LoRA, quantisation, memory)
is arithmetic over that description. Compared with models built on the meta device in ``tests/unit/api``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from finetune_api.plan import ModelFacts, ParameterCounts
from finetune_api.spec import FineTuneJobSpec, LoraOptions, MethodType

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Linear:
    """One ``nn.Linear``: weight (outputs, inputs) and perhaps a bias (outputs,)."""

    name: str  # within the decoder layer: "self_attn.q_proj"
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weight(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weight + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Shape:
    """The tensors of a decoder-only model."""

    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]  # of one decoder layer
    norms: int  # normalisation parameters of one decoder layer
    final_norm: int

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return sum(linear.parameters for linear in self.linears) + self.norms

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        heads = 1 if self.tied else 2
        return self.layers * self.layer + heads * self.embedding + self.final_norm

    @property
    def quantizable(self) -> int:
        """Weights that QLoRA stores in 4 bit: every linear layer inside the decoder layers, biases excluded."""
        return self.layers * sum(linear.weight for linear in self.linears)

    def modules(self) -> Iterator[Linear]:
        """Every module that can carry weights of its own, under its full name; embeddings count as linear."""
        yield Linear("model.embed_tokens", self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for linear in self.linears:
                yield Linear(f"model.layers.{layer}.{linear.name}", linear.inputs, linear.outputs, linear.bias)
        yield Linear("lm_head", self.hidden, self.vocabulary)


@dataclass(frozen=True)
class _Dimensions:
    hidden: int
    intermediate: int
    queries: int  # attention heads x head dimension
    values: int  # key-value heads x head dimension
    head: int
    facts: ModelFacts


def _separate(d: _Dimensions, query_bias: bool, output_bias: bool, mlp_bias: bool) -> tuple[Linear, ...]:
    return (
        Linear("self_attn.q_proj", d.hidden, d.queries, query_bias),
        Linear("self_attn.k_proj", d.hidden, d.values, query_bias),
        Linear("self_attn.v_proj", d.hidden, d.values, query_bias),
        Linear("self_attn.o_proj", d.queries, d.hidden, output_bias),
        Linear("mlp.gate_proj", d.hidden, d.intermediate, mlp_bias),
        Linear("mlp.up_proj", d.hidden, d.intermediate, mlp_bias),
        Linear("mlp.down_proj", d.intermediate, d.hidden, mlp_bias),
    )


def _llama(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    bias = d.facts.attention_bias
    return _separate(d, bias, bias, d.facts.mlp_bias), 2 * d.hidden


def _mistral(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    return _separate(d, False, False, False), 2 * d.hidden


def _qwen2(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    return _separate(d, True, False, False), 2 * d.hidden


def _qwen3(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    bias = d.facts.attention_bias
    return _separate(d, bias, bias, False), 2 * d.hidden + 2 * d.head


def _gemma(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    bias = d.facts.attention_bias
    return _separate(d, bias, bias, False), 2 * d.hidden


def _gemma2(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    bias = d.facts.attention_bias
    return _separate(d, bias, bias, False), 4 * d.hidden


def _olmo2(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    bias = d.facts.attention_bias
    return _separate(d, bias, bias, False), 2 * d.hidden + d.queries + d.values


def _phi3(d: _Dimensions) -> tuple[tuple[Linear, ...], int]:
    linears = (
        Linear("self_attn.qkv_proj", d.hidden, d.queries + 2 * d.values),
        Linear("self_attn.o_proj", d.queries, d.hidden),
        Linear("mlp.gate_up_proj", d.hidden, 2 * d.intermediate),
        Linear("mlp.down_proj", d.intermediate, d.hidden),
    )
    return linears, 2 * d.hidden


_ARCHITECTURES: dict[str, Callable[[_Dimensions], tuple[tuple[Linear, ...], int]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "olmo2": _olmo2,
    "granite": _llama,
    "phi3": _phi3,
}


def known_architectures() -> tuple[str, ...]:
    """``model_type`` values whose parameters are counted exactly."""
    return tuple(_ARCHITECTURES)


def shape_of(facts: ModelFacts) -> Shape | None:
    """The tensors of a model, or ``None`` where the architecture (or a number) is unknown."""
    build = _ARCHITECTURES.get(facts.model_type)
    hidden, heads, layers, vocabulary = facts.hidden_size, facts.attention_heads, facts.layers, facts.vocabulary_size
    intermediate = facts.intermediate_size
    if build is None or facts.experts or not (hidden and heads and layers and vocabulary and intermediate):
        return None
    head = facts.head_dimension or hidden // heads
    key_value_heads = facts.key_value_heads or heads
    dimensions = _Dimensions(hidden, intermediate, heads * head, key_value_heads * head, head, facts)
    linears, norms = build(dimensions)
    return Shape(
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        tied=facts.tied_embeddings,
        linears=linears,
        norms=norms,
        final_norm=hidden,
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def adapted_modules(shape: Shape, lora: LoraOptions) -> list[Linear]:
    """Modules that get a LoRA pair: all linear layers of the decoder, or those whose name ends with a target."""
    if ALL_LINEAR in lora.target_modules:
        return [m for m in shape.modules() if m.name not in {"lm_head", "model.embed_tokens"}]
    return [m for m in shape.modules() if any(_matches(m.name, target) for target in lora.target_modules)]


def saved_modules(shape: Shape, lora: LoraOptions) -> list[Linear]:
    """Modules trained whole beside the adapter (``modulesToSave``)."""
    return [m for m in shape.modules() if any(_matches(m.name, name) for name in lora.modules_to_save)]


def unmatched_names(shape: Shape, names: tuple[str, ...]) -> list[str]:
    """Target names that fit no module of the model."""
    modules = list(shape.modules())
    return [n for n in names if n != ALL_LINEAR and not any(_matches(m.name, n) for m in modules)]


def module_names(shape: Shape) -> list[str]:
    """Last components of every module name, for 'did you mean'."""
    return sorted({module.name.rsplit(".", 1)[-1] for module in shape.modules()})


def adapter_matrices(shape: Shape, lora: LoraOptions) -> list[tuple[int, int]]:
    """(rows, columns) of every trainable tensor of a LoRA adapter; vectors have one column."""
    matrices: list[tuple[int, int]] = []
    for module in adapted_modules(shape, lora):
        matrices += [(lora.rank, module.inputs), (module.outputs, lora.rank)]
        if lora.use_dora:
            matrices.append((module.outputs, 1))
    for module in saved_modules(shape, lora):
        matrices.append((module.outputs, module.inputs))
        if module.bias:
            matrices.append((module.outputs, 1))
    return matrices


def full_matrices(shape: Shape) -> list[tuple[int, int]]:
    """(rows, columns) of every tensor of the base model."""
    layer = [(linear.outputs, linear.inputs) for linear in shape.linears]
    layer += [(linear.outputs, 1) for linear in shape.linears if linear.bias]
    layer.append((shape.norms, 1))
    heads = [(shape.vocabulary, shape.hidden)] * (1 if shape.tied else 2)
    return layer * shape.layers + heads + [(shape.final_norm, 1)]


def count_parameters(spec: FineTuneJobSpec, facts: ModelFacts) -> ParameterCounts | None:
    """Total, trainable and quantised parameters; ``exact`` only for known architectures."""
    shape = shape_of(facts)
    full = spec.method.type is MethodType.FULL
    if shape is None:
        if facts.parameter_count is None:
            return None
        trainable = facts.parameter_count if full else 0
        return ParameterCounts(total=facts.parameter_count, trainable=trainable, exact=False)
    if full:
        return ParameterCounts(total=shape.total, trainable=shape.total, exact=True)
    trainable = sum(rows * columns for rows, columns in adapter_matrices(shape, spec.method.lora or LoraOptions()))
    quantized = shape.quantizable if spec.method.type is MethodType.QLORA else 0
    return ParameterCounts(total=shape.total + trainable, trainable=trainable, quantized=quantized, exact=True)
