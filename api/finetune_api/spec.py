"""FineTuneJobSpec: what a user asks for. Field names are promises; defaults appear in ``status.plan``.

The same classes parse the YAML of the CLI, the object from the API server and the mounted JSON.
Rules that need more than one field live in ``validation.py``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.fields import (
    DataUri,
    DnsLabel,
    Endpoint,
    Fraction,
    ModelUri,
    ModuleName,
    OutputUri,
    Quantity,
    SchemaModel,
)


class Initialization(StrEnum):
    PRETRAINED = "Pretrained"
    RANDOM = "Random"


class TaskType(StrEnum):
    CAUSAL_LM = "CausalLM"


class DataFormat(StrEnum):
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    TEXT = "Text"


class LossOn(StrEnum):
    COMPLETION = "Completion"
    ALL = "All"


class Truncation(StrEnum):
    DROP = "Drop"
    TRUNCATE = "Truncate"
    FAIL = "Fail"


class MethodType(StrEnum):
    FULL = "Full"
    LORA = "LoRA"
    QLORA = "QLoRA"


class QuantizationType(StrEnum):
    NF4 = "NF4"
    FP4 = "FP4"


class Precision(StrEnum):
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class ScheduleType(StrEnum):
    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"
    POLYNOMIAL = "Polynomial"
    INVERSE_SQUARE_ROOT = "InverseSquareRoot"
    WARMUP_STABLE_DECAY = "WarmupStableDecay"
    ONE_CYCLE = "OneCycle"
    SLANTED_TRIANGULAR = "SlantedTriangular"


class OptimizerType(StrEnum):
    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"
    SGD = "SGD"
    ADAFACTOR = "Adafactor"


class GradientCheckpointing(StrEnum):
    AUTO = "Auto"
    NONE = "None"
    FULL = "Full"
    SELECTIVE = "Selective"


class StrategyType(StrEnum):
    AUTO = "Auto"
    DDP = "DDP"
    FSDP = "FSDP"
    DEEPSPEED = "DeepSpeed"


class Sharding(StrEnum):
    FULL = "Full"
    HYBRID = "Hybrid"
    GRADIENT_AND_OPTIMIZER = "GradientAndOptimizer"


class Offload(StrEnum):
    NONE = "None"
    CPU = "CPU"
    NVME = "NVMe"


class OutputFormat(StrEnum):
    ADAPTER = "Adapter"
    MERGED_MODEL = "MergedModel"
    FULL_MODEL = "FullModel"


class SecretReference(SchemaModel):
    """A Secret whose keys become environment variables with their standard names. Named, never read by the operator."""

    secret_name: DnsLabel


class ObjectLocation(SchemaModel):
    """How to reach the object store behind a ``uri``; all optional, standard environment variables fill the rest."""

    credentials: SecretReference | None = None
    endpoint: Endpoint | None = None
    region: Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9-]+$")] | None = None
    path_style: bool | None = None  # absent: true with an endpoint, else false


class Model(ObjectLocation):
    """The base model: ``config.json``, tokenizer files and safetensors under one URI."""

    uri: ModelUri
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$", max_length=40)] | None = None
    initialization: Initialization = Initialization.PRETRAINED
    trust_remote_code: bool = False


class Task(SchemaModel):
    """What is learned. A union that grows with the catalogue of tasks."""

    type: TaskType = TaskType.CAUSAL_LM


class DataSource(ObjectLocation):
    """Files of one kind: JSONL (plain, .gz, .zst), Parquet, Arrow or CSV. ``*`` globs within the last path segments."""

    uri: DataUri
    format: DataFormat | None = None  # absent: detected, or refused when ambiguous
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0  # copies per epoch; 0.5 takes half, 2 takes all twice


class Validation(SchemaModel):
    """Held-out data: a fraction of the training rows (stable by content hash) or sources of their own."""

    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    sources: Annotated[tuple[DataSource, ...], Field(max_length=64)] = ()


class Dataset(SchemaModel):
    train: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=64)]
    validation: Validation | None = None
    max_sequence_length: Annotated[int, Field(ge=8, le=4_194_304)] = 2048  # tokens
    packing: bool = True
    loss_on: LossOn = LossOn.COMPLETION
    truncation: Truncation = Truncation.DROP


class LoraOptions(SchemaModel):
    """Hu et al. 2021 (arXiv:2106.09685); rsLoRA (2312.03732), DoRA (2402.09353), LoRA+ (2402.12354)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0.0, le=65536.0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Annotated[tuple[ModuleName, ...], Field(min_length=1, max_length=64)] = ("all-linear",)
    modules_to_save: Annotated[tuple[ModuleName, ...], Field(max_length=64)] = ()
    use_rslora: bool = False
    use_dora: bool = False
    learning_rate_ratio: Annotated[float, Field(ge=1.0, le=1000.0)] = 1.0  # LoRA+: rate of B over rate of A


class QuantizationOptions(SchemaModel):
    """4-bit storage of the frozen base (Dettmers et al. 2023, arXiv:2305.14314)."""

    type: QuantizationType = QuantizationType.NF4
    double_quantization: bool = True
    compute_type: Precision | None = None  # absent: training.precision


class Method(SchemaModel):
    type: MethodType
    lora: LoraOptions | None = None  # LoRA and QLoRA; absent: defaults
    quantization: QuantizationOptions | None = None  # QLoRA; absent: defaults


class Schedule(SchemaModel):
    """Learning rate over steps; formulas in docs/schedules.md."""

    type: ScheduleType = ScheduleType.COSINE
    warmup_fraction: Fraction | None = None  # of all steps; at most one of the two; both absent: 0.03
    warmup_steps: Annotated[int, Field(ge=0, le=100_000_000)] | None = None
    minimum_fraction: Fraction = 0.0  # of learningRate at the end
    cycles: Annotated[int, Field(ge=1, le=1000)] = 1  # Cosine: number of cosine cycles, hard restarts between them
    power: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0  # Polynomial
    decay_fraction: Fraction = 0.2  # WarmupStableDecay: last part of the steps that decays
    peak_fraction: Fraction = 0.1  # SlantedTriangular cut fraction; OneCycle: 0.3 is usual
    initial_ratio: Annotated[float, Field(ge=1.0, le=1.0e6)] = 32.0  # SlantedTriangular, OneCycle: peak over first rate


class Optimizer(SchemaModel):
    type: OptimizerType = OptimizerType.ADAMW
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    epsilon: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # SGD
    decay_bias_and_norm: bool = False  # weight decay also on biases and normalisation weights


class EarlyStopping(SchemaModel):
    """Stop after ``patience`` evaluations without a fall of the loss by ``minimumDelta``; the best is published."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    minimum_delta: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0


class Training(SchemaModel):
    epochs: Annotated[float, Field(gt=0.0, le=10_000.0)] | None = (
        None  # one of epochs and maxSteps; both absent: 1 epoch
    )
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    global_batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = (
        32  # samples (packed: rows) per optimizer step, whole job
    )
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None  # samples (rows) per forward and rank
    learning_rate: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0e-4
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    max_gradient_norm: Annotated[float, Field(gt=0.0, le=1.0e6)] | None = 1.0
    precision: Precision = Precision.BF16
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.AUTO
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    neftune_alpha: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0  # arXiv:2310.05914; 0 is off
    evaluate_every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None  # absent: at the end only
    early_stopping: EarlyStopping | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42


class FsdpOptions(SchemaModel):
    sharding: Sharding = Sharding.FULL
    cpu_offload: bool = False


class DeepSpeedOptions(SchemaModel):
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
    offload_optimizer: Offload = Offload.NONE
    offload_parameters: Offload = Offload.NONE
    configuration: Annotated[dict[str, Any], Field(max_length=32)] = {}  # allow-listed pass-through


class Strategy(SchemaModel):
    type: StrategyType = StrategyType.AUTO
    fsdp: FsdpOptions | None = None
    deepspeed: DeepSpeedOptions | None = None


class Distributed(SchemaModel):
    nodes: Annotated[int, Field(ge=1, le=4096)] = 1
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = None  # absent: accelerators per pod, or 1 on CPU
    strategy: Strategy = Strategy()


class Accelerator(SchemaModel):
    resource_name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$")] = (
        "nvidia.com/gpu"
    )
    count: Annotated[int, Field(ge=1, le=64)] = 1
    memory: Quantity | None = None  # of one device; lets the planner judge the fit


class ResourceAmounts(SchemaModel):
    cpu: Quantity | None = None
    memory: Quantity | None = None


class Resources(SchemaModel):
    """Per pod. Absent accelerator: CPU training."""

    accelerator: Accelerator | None = None
    requests: ResourceAmounts = ResourceAmounts()
    limits: ResourceAmounts = ResourceAmounts()
    shared_memory: Quantity | None = None
    scratch: Quantity | None = None


class Toleration(SchemaModel):
    key: Annotated[str, Field(max_length=316)] | None = None
    operator: Annotated[str, Field(max_length=6, pattern=r"^(Exists|Equal)$")] | None = None
    value: Annotated[str, Field(max_length=63)] | None = None
    effect: Annotated[str, Field(max_length=16, pattern=r"^(NoSchedule|PreferNoSchedule|NoExecute)$")] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class Placement(SchemaModel):
    node_selector: Annotated[
        dict[Annotated[str, Field(max_length=316)], Annotated[str, Field(max_length=63)]], Field(max_length=32)
    ] = {}
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=32)] = ()
    priority_class_name: Annotated[str, Field(max_length=253)] = ""
    scheduler_name: Annotated[str, Field(max_length=253)] = ""
    topology_key: Annotated[str, Field(max_length=316)] = ""


class CheckpointPolicy(SchemaModel):
    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    every_minutes: Annotated[float, Field(gt=0.0, le=10_080.0)] | None = 30.0
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    on_termination: bool = True


class Output(ObjectLocation):
    """Where artifacts and checkpoints go: ``<uri>/<namespace>/<name>/<uid>/``."""

    uri: OutputUri
    format: OutputFormat | None = None  # absent: Adapter, or FullModel for method Full


class RunPolicy(SchemaModel):
    suspend: bool = False
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = None
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 3


class FineTuneJobSpec(SchemaModel):
    model: Model
    task: Task = Task()
    dataset: Dataset
    method: Method
    training: Training = Training()
    distributed: Distributed = Distributed()
    resources: Resources = Resources()
    placement: Placement = Placement()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    output: Output
    run_policy: RunPolicy = RunPolicy()
    managed_by: Annotated[str, Field(max_length=253)] | None = None
