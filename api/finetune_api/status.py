"""What the operator says about a job: ``status`` of a FineTuneJob. Fractions are text: no floats in a status."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.fields import SchemaModel

Word = Annotated[str, Field(max_length=64)]
Name = Annotated[str, Field(max_length=316)]
Sentence = Annotated[str, Field(max_length=4096)]
Uri = Annotated[str, Field(max_length=2048)]
Time = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Decimal = Annotated[str, Field(max_length=32, pattern=r"^-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Digest = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")]


class StatusDecision(SchemaModel):
    field: Name
    value: Name
    reason: Annotated[str, Field(max_length=1024)] = ""


class StatusMemory(SchemaModel):
    weights: Count = 0
    gradients: Count = 0
    optimizer: Count = 0
    activations: Count = 0
    logits: Count = 0
    total: Count = 0
    host: Count = 0


class StatusPlan(SchemaModel):
    world_size: Count
    nodes: Count | None = None
    strategy: Name
    micro_batch_size: Count
    gradient_accumulation_steps: Count
    total_steps: Count | None = None
    model_revision: Word | None = None
    memory_per_device: StatusMemory | None = None
    decisions: Annotated[tuple[StatusDecision, ...], Field(max_length=64)] = ()
    warnings: Annotated[tuple[Sentence, ...], Field(max_length=32)] = ()


class StatusProgress(SchemaModel):
    phase: Word | None = None  # of the slowest node
    step: Count = 0
    total_steps: Count | None = None
    epoch: Decimal | None = None
    loss: Decimal | None = None
    validation_loss: Decimal | None = None
    learning_rate: Decimal | None = None
    tokens_per_second: Count | None = None
    eta_seconds: Count | None = None
    updated_at: Time | None = None


class StatusAttempt(SchemaModel):
    number: Count
    started_at: Time | None = None
    ended_at: Time | None = None
    cause: Word | None = None  # an exit class of the trainer, or what happened to a pod; absent while it runs
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None
    resumed_from_step: Count | None = None
    last_step: Count | None = None
    lost_steps: Count | None = None  # done by this attempt and done again by the next
    pod: Name | None = None  # where it ended
    node: Name | None = None
    message: Sentence | None = None
    gang: Word | None = None  # how the launchers name this attempt
    pods: Annotated[tuple[Annotated[str, Field(max_length=8)], ...], Field(max_length=4096)] = ()  # short uids


class StatusRestarts(SchemaModel):
    """How many attempts ended by one cause, also those that the ledger no longer lists."""

    cause: Word
    count: Count


class StatusCheckpoint(SchemaModel):
    step: Count
    uri: Uri
    saved_at: Time | None = None


class StatusArtifacts(SchemaModel):
    uri: Uri
    manifest_sha256: Digest
    files: Count = 0
    bytes: Count = 0


class StatusMetrics(SchemaModel):
    train_loss: Decimal | None = None
    validation_loss: Decimal | None = None
    base_validation_loss: Decimal | None = None


class Condition(SchemaModel):
    """Kubernetes' metav1.Condition."""

    type: Name
    status: Annotated[str, Field(max_length=7, pattern="^(True|False|Unknown)$")]
    reason: Annotated[str, Field(max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""
    observed_generation: Count | None = None
    last_transition_time: Time


class FineTuneJobStatus(SchemaModel):
    observed_generation: Count | None = None
    state: Word | None = None  # for people, derived from the conditions
    message: Sentence | None = None
    plan: StatusPlan | None = None
    progress: StatusProgress | None = None
    attempts: Annotated[tuple[StatusAttempt, ...], Field(max_length=20)] = ()
    total_attempts: Count | None = None
    restarts: Annotated[tuple[StatusRestarts, ...], Field(max_length=64)] = ()
    checkpoint: StatusCheckpoint | None = None
    artifacts: StatusArtifacts | None = None
    metrics: StatusMetrics | None = None
    conditions: Annotated[tuple[Condition, ...], Field(max_length=32)] = ()
