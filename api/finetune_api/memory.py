"""Bytes per device by part, for Full, LoRA and QLoRA under every strategy. An upper estimate, told by part.

Weights that are trained are 32-bit masters under DDP and FSDP (autocast or FSDP casts them for compute); frozen weights
are stored in the compute type. DeepSpeed keeps 16-bit parameters, accumulates gradients in 32 bit, and keeps 32-bit
masters in its optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.parameters import Shape, adapter_matrices, full_matrices, shape_of
from finetune_api.plan import (
    CheckpointingMode,
    Facts,
    MemoryEstimate,
    ModelFacts,
    ParameterCounts,
    ResolvedStrategy,
)
from finetune_api.quantities import parse_quantity
from finetune_api.spec import (
    FineTuneJobSpec,
    LoraOptions,
    MethodType,
    Offload,
    OptimizerType,
    Precision,
    QuantizationOptions,
    Sharding,
    StrategyType,
)

LOGIT_CHUNK_TOKENS = 1024  # the loss never holds logits of more supervised tokens than this
USABLE_FRACTION = 0.9  # of a device: the rest is the runtime's context and fragmentation
_ASSUMED_ACCELERATOR = 24 * 2**30
_ASSUMED_HOST_SHARE = 4 * 2**30
_DEEPSPEED_BUCKET = 500_000_000  # elements; DeepSpeed's default reduce_bucket_size


@dataclass(frozen=True)
class Layout:
    """Everything besides the model that decides memory."""

    strategy: ResolvedStrategy
    world_size: int
    processes_per_node: int
    micro_batch_size: int
    checkpointing: CheckpointingMode


@dataclass(frozen=True)
class Budget:
    """Bytes one rank may use, and whether the user said so."""

    bytes: int
    known: bool


@dataclass(frozen=True)
class _Model:
    """Parameter counts split the way memory needs them."""

    trainable: int
    frozen: int  # not quantised
    quantized: int
    unit: int  # parameters gathered at once: one decoder layer, or an embedding
    optimizer_bytes: int


def memory_budget(spec: FineTuneJobSpec, processes_per_node: int) -> Budget:
    """Usable bytes per rank: of the accelerator, or this rank's share of the pod's memory limit on CPU."""
    accelerator = spec.resources.accelerator
    if accelerator is not None:
        known = accelerator.memory is not None
        size = parse_quantity(accelerator.memory) if accelerator.memory else _ASSUMED_ACCELERATOR
        return Budget(int(size * USABLE_FRACTION), known)
    limit = spec.resources.limits.memory
    size = parse_quantity(limit) // processes_per_node if limit else _ASSUMED_HOST_SHARE
    return Budget(int(size * USABLE_FRACTION), limit is not None)


def compute_bytes(precision: Precision) -> int:
    """Bytes per element of activations and frozen weights."""
    return 4 if precision is Precision.FP32 else 2


def estimate_memory(
    spec: FineTuneJobSpec, facts: Facts, counts: ParameterCounts | None, layout: Layout
) -> MemoryEstimate | None:
    """Bytes on the fullest rank; ``None`` where the model is not known well enough."""
    if facts.model is None or counts is None:
        return None
    shape = shape_of(facts.model)
    model = _split(spec, counts, shape)
    if layout.strategy.type is StrategyType.DEEPSPEED:
        states = _deepspeed_states(spec, model, layout)
    elif layout.strategy.type is StrategyType.FSDP:
        states = _fsdp_states(spec, model, layout)
    else:
        states = _replicated_states(spec, model)
    activations = _activations(spec, facts.model, shape, layout)
    logits = _logits(spec, facts.model, layout)
    parts = (states.weights, states.gradients, states.optimizer, activations, logits)
    return MemoryEstimate(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations,
        logits=logits,
        total=sum(parts) + (0 if spec.resources.accelerator else states.host),  # on CPU the host is the device
        host=states.host,
    )


@dataclass(frozen=True)
class _States:
    weights: int
    gradients: int
    optimizer: int
    host: int = 0


def quantized_bytes(weights: int, options: QuantizationOptions) -> int:
    """Packed 4-bit weights with their scales: blocks of 64, the scales themselves in 8 bit when quantised again."""
    scales = weights / 64 + 4 * weights / (64 * 256) if options.double_quantization else 4 * weights / 64
    return int(weights / 2 + scales)


def _split(spec: FineTuneJobSpec, counts: ParameterCounts, shape: Shape | None) -> _Model:
    frozen = counts.total - counts.trainable - counts.quantized
    unit = max(shape.layer, shape.embedding) if shape else counts.total // 16
    return _Model(
        trainable=counts.trainable,
        frozen=frozen,
        quantized=counts.quantized,
        unit=unit,
        optimizer_bytes=_optimizer_bytes(spec, counts, shape),
    )


def _optimizer_bytes(spec: FineTuneJobSpec, counts: ParameterCounts, shape: Shape | None) -> int:
    """State of the optimizer without masters."""
    optimizer = spec.training.optimizer
    if optimizer.type is OptimizerType.SGD:
        return 4 * counts.trainable if optimizer.momentum else 0
    if optimizer.type in {OptimizerType.ADAMW_8BIT, OptimizerType.PAGED_ADAMW_8BIT}:
        return 2 * counts.trainable
    if optimizer.type is OptimizerType.ADAFACTOR:
        if shape is None:
            return counts.trainable // 100
        full = spec.method.type is MethodType.FULL
        matrices = full_matrices(shape) if full else adapter_matrices(shape, spec.method.lora or LoraOptions())
        return 4 * sum(rows + columns if columns > 1 else rows for rows, columns in matrices)
    return 8 * counts.trainable


def _stored(spec: FineTuneJobSpec, model: _Model) -> int:
    """Bytes of the frozen base."""
    options = spec.method.quantization or QuantizationOptions()
    return model.frozen * compute_bytes(spec.training.precision) + quantized_bytes(model.quantized, options)


def _replicated_states(spec: FineTuneJobSpec, model: _Model) -> _States:
    casts = 0 if spec.training.precision is Precision.FP32 else 2 * model.trainable  # autocast keeps its copies
    paged = spec.training.optimizer.type is OptimizerType.PAGED_ADAMW_8BIT
    return _States(
        weights=_stored(spec, model) + 4 * model.trainable + casts,
        gradients=4 * model.trainable,
        optimizer=0 if paged else model.optimizer_bytes,
        host=model.optimizer_bytes if paged else 0,
    )


def _fsdp_states(spec: FineTuneJobSpec, model: _Model, layout: Layout) -> _States:
    hybrid = layout.strategy.sharding is Sharding.HYBRID
    ranks = layout.processes_per_node if hybrid else layout.world_size
    width = compute_bytes(spec.training.precision)
    stored = _stored(spec, model) + 4 * model.trainable
    total = model.trainable + model.frozen + model.quantized
    unit_share = min(1.0, model.unit / total) if total else 0.0
    whole = _stored(spec, model) + width * model.trainable  # gathered, in the compute type
    kept = layout.strategy.sharding is Sharding.GRADIENT_AND_OPTIMIZER
    gathered = whole if kept else int(2 * unit_share * whole)  # the unit in use and the one fetched ahead
    reducing = int(4 * unit_share * model.trainable)
    shards = (stored // ranks, 4 * model.trainable // ranks, model.optimizer_bytes // ranks)
    if layout.strategy.cpu_offload:
        return _States(gathered, reducing, 0, host=sum(shards))
    return _States(shards[0] + gathered, shards[1] + reducing, shards[2])


def _deepspeed_states(spec: FineTuneJobSpec, model: _Model, layout: Layout) -> _States:
    stage, ranks = layout.strategy.zero_stage or 2, layout.world_size
    width = compute_bytes(spec.training.precision)
    stored = _stored(spec, model) + width * model.trainable
    optimizer = (4 * model.trainable + model.optimizer_bytes) // ranks  # 32-bit masters live in the optimizer
    bucket = width * min(_DEEPSPEED_BUCKET, model.trainable)
    gradients = 4 * model.trainable // (ranks if stage >= 2 else 1) + bucket  # accumulated in 32 bit
    total = model.trainable + model.frozen + model.quantized
    gathered = int(2 * min(1.0, model.unit / total) * stored) if stage == 3 and total else 0
    weights = stored // ranks if stage == 3 else stored
    host = 0
    if layout.strategy.offload_parameters is not Offload.NONE:
        host += weights if layout.strategy.offload_parameters is Offload.CPU else 0
        weights = 0
    if layout.strategy.offload_optimizer is not Offload.NONE:
        host += optimizer if layout.strategy.offload_optimizer is Offload.CPU else 0
        optimizer = 0
    return _States(weights + gathered, gradients, optimizer, host)


def _activations(spec: FineTuneJobSpec, facts: ModelFacts, shape: Shape | None, layout: Layout) -> int:
    """What the backward pass needs, for one micro-batch of full-length rows."""
    tokens = layout.micro_batch_size * spec.dataset.max_sequence_length
    width = compute_bytes(spec.training.precision)
    hidden, layers = facts.hidden_size or 0, facts.layers or 0
    per_layer = tokens * _layer_bytes_per_token(spec, facts, width)
    boundary = tokens * hidden * width
    ends = tokens * hidden * (width + 8)  # embeddings, final normalisation (which computes in 32 bit)
    workspace = 0
    if spec.method.type is MethodType.QLORA and shape:
        workspace = width * max(linear.weight for linear in shape.linears)  # one layer's weight, dequantised
    if layout.checkpointing is CheckpointingMode.FULL:
        return layers * boundary + per_layer + ends + workspace
    if layout.checkpointing is CheckpointingMode.SELECTIVE:
        products = tokens * width * _product_outputs(facts)
        return layers * (boundary + products) + per_layer + ends + workspace
    return layers * per_layer + ends + workspace


def _product_outputs(facts: ModelFacts) -> int:
    """Elements per token that the matrix products and attention of one layer give: what Selective keeps."""
    hidden, intermediate = facts.hidden_size or 0, facts.intermediate_size or 4 * (facts.hidden_size or 0)
    heads, head = facts.attention_heads or 0, facts.head_dimension or 0
    queries, values = heads * head, (facts.key_value_heads or heads) * head
    return 2 * queries + 2 * values + 2 * hidden + 2 * intermediate


def _layer_bytes_per_token(spec: FineTuneJobSpec, facts: ModelFacts, width: int) -> int:
    hidden = facts.hidden_size or 0
    heads = facts.attention_heads or 0
    head = facts.head_dimension or 0
    queries, values = heads * head, (facts.key_value_heads or heads) * head
    intermediate = facts.intermediate_size or 4 * hidden
    norms = 2 * hidden * (4 + 2 * width)  # input in 32 bit, normalised output, residual sum
    attention = (2 * (queries + values) + values) * width + 2 * queries * width  # before/after rotation, output twice
    mlp = 4 * intermediate * width  # gate, up, activated gate, product
    lora = spec.method.lora or LoraOptions()
    dropped = 0
    if spec.method.type is not MethodType.FULL and lora.dropout > 0:
        dropped = (5 * hidden + queries + intermediate) * (width + 1)  # input copy and mask of every adapted module
    return norms + attention + mlp + dropped


def _logits(spec: FineTuneJobSpec, facts: ModelFacts, layout: Layout) -> int:
    """Logits of one chunk in 32 bit, and their gradient."""
    tokens = min(LOGIT_CHUNK_TOKENS, layout.micro_batch_size * spec.dataset.max_sequence_length)
    return 2 * 4 * tokens * (facts.vocabulary_size or 0)
