"""What will run: the resolved answer to a spec. Pure data; ``planner.py`` computes it.

Everything that was chosen for the user stands in ``decisions`` with its reason. Bytes are bytes, counts are counts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.fields import SchemaModel
from finetune_api.spec import MethodType, Offload, OutputFormat, Precision, Sharding, StrategyType


class ModelFacts(SchemaModel):
    """Read from ``config.json`` and the safetensors index only, never from weights. Unknown numbers stay ``None``."""

    architecture: str  # "LlamaForCausalLM"
    model_type: str  # "llama"
    hidden_size: int | None = None
    layers: int | None = None
    attention_heads: int | None = None
    key_value_heads: int | None = None
    head_dimension: int | None = None
    intermediate_size: int | None = None
    vocabulary_size: int | None = None
    maximum_positions: int | None = None
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    experts: int = 0  # > 0: mixture of experts
    storage_dtype: str | None = None  # "bfloat16"
    parameter_count: int | None = None  # exact where the architecture is known, else from the index's total size
    parameter_count_exact: bool = False
    weight_bytes: int | None = None  # of the safetensors files
    revision: str | None = None
    licence: str | None = None


class DatasetFacts(SchemaModel):
    """Read from listings and headers; after preparation by the launcher every number is exact."""

    files: int = 0
    bytes: int = 0
    train_samples: int | None = None  # after truncation policy and split; packed: rows
    validation_samples: int | None = None
    train_tokens: int | None = None
    exact: bool = False
    digest: str | None = None  # sha256 over contents and preparation settings


class Facts(SchemaModel):
    model: ModelFacts | None = None
    dataset: DatasetFacts | None = None


class CheckpointingMode(StrEnum):
    """Activation checkpointing as resolved (``Auto`` is gone)."""

    NONE = "None"
    FULL = "Full"
    SELECTIVE = "Selective"


class ResolvedStrategy(SchemaModel):
    """The engine and its options. ``label`` is for people."""

    type: StrategyType  # DDP | FSDP | DeepSpeed
    label: str
    sharding: Sharding | None = None  # FSDP
    cpu_offload: bool = False  # FSDP
    zero_stage: int | None = None  # DeepSpeed
    offload_optimizer: Offload = Offload.NONE
    offload_parameters: Offload = Offload.NONE


class ParameterCounts(SchemaModel):
    total: int  # base model and adapter
    trainable: int
    quantized: int = 0  # stored in 4 bit
    exact: bool  # False: the architecture is unknown to the planner and the self-check does not compare


class MemoryEstimate(SchemaModel):
    """Bytes per device by part, for the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    total: int
    host: int = 0  # offloaded parts, per rank


class Decision(SchemaModel):
    """A value that was chosen for the user."""

    field: str
    value: str
    reason: str


class Plan(SchemaModel):
    """The plan of a job: the same on every rank; the step-0 self-check compares reality with it."""

    world_size: int
    nodes: int
    processes_per_node: int
    device: Annotated[str, Field(pattern="^(cpu|cuda)$")]
    strategy: ResolvedStrategy
    method: MethodType
    precision: Precision
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    gradient_checkpointing: CheckpointingMode
    total_steps: int | None = None  # None until the data is prepared
    steps_per_epoch: int | None = None
    warmup_steps: int | None = None
    parameters: ParameterCounts | None = None
    memory_per_device: MemoryEstimate | None = None
    model_revision: str | None = None
    output_format: OutputFormat
    artifact_prefix: str  # object URI, ends with "/": <output>/<namespace>/<name>/<uid>/
    checkpoint_prefix: str  # object URI, ends with "/"
    decisions: tuple[Decision, ...] = ()
    warnings: tuple[str, ...] = ()
