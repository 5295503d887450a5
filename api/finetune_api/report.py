"""What a job says while it runs and when it ends: heartbeats, termination message, manifests, report."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_api.exits import ExitClass
from finetune_api.fields import SchemaModel
from finetune_api.plan import Plan

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Phase(StrEnum):
    """Where a rank (or the launcher) is."""

    PREPARING_DATA = "PreparingData"
    FETCHING_MODEL = "FetchingModel"
    RENDEZVOUS = "Rendezvous"
    LOADING_MODEL = "LoadingModel"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    CHECKPOINTING = "Checkpointing"
    PUBLISHING = "Publishing"
    DONE = "Done"


# Upper bounds (seconds, inclusive) of the step time histogram; the last bucket is everything above.
STEP_SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Heartbeat(SchemaModel):
    """One rank's latest word: ``<work>/ranks/<rank>.json``, replaced atomically at every step and phase change."""

    rank: int
    local_rank: int
    pid: int
    phase: Phase
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_total: int = 0  # trained tokens of the whole job, counted since step 0
    tokens_per_second: float | None = None  # whole job, last steps
    step_seconds: float | None = None
    step_seconds_counts: tuple[int, ...] = ()  # steps of this attempt per bucket of STEP_SECONDS_BUCKETS, and above
    step_seconds_sum: float = 0.0
    data_wait_seconds: float = 0.0  # total
    model_flops_utilization: float | None = None
    memory_bytes: int = 0  # device allocated (CUDA) or resident (CPU), now
    peak_memory_bytes: int = 0
    checkpoint_step: int | None = None
    checkpoint_seconds: float | None = None
    checkpoint_bytes: int | None = None
    checkpoint_uri: str | None = None
    checkpoint_saved_at: float | None = None  # unix seconds
    resumed_from_step: int | None = None  # where this attempt's training began; None until it trains
    updated_at: float = 0.0  # unix seconds


class RankEnd(SchemaModel):
    """How one rank process ended: ``<work>/ranks/<rank>.end.json``."""

    rank: int
    exit_class: ExitClass
    step: int
    phase: Phase
    message: str = ""
    hint: str = ""
    exception: str = ""  # type name
    traceback: str = ""


class EndedAttempt(SchemaModel):
    """One start of all ranks that is over, as one launcher remembers it; times are unix seconds."""

    gang: str  # names the attempt: the same word on every launcher that took part
    number: int  # of this launcher, from 1
    started_at: float = 0.0
    ended_at: float = 0.0
    exit_class: ExitClass
    guilty_rank: int | None = None
    guilty_node: int | None = None  # node rank
    resumed_from_step: int | None = None
    last_step: int | None = None
    message: str = ""


class Progress(SchemaModel):
    """One launcher's ``/progress``: where its node is, and the latest word of each of its ranks."""

    schema_version: Literal[1] = 1
    job: dict[str, str]  # namespace, name, uid
    node_rank: int
    pid: int
    phase: Phase  # of the launcher until its ranks speak, then of the lowest local rank
    message: str = ""  # what is being prepared, in words
    done: float | None = None  # of ``total``, in the unit that ``message`` names
    total: float | None = None
    attempt: int = 0  # 1: the first start of the ranks; 0: not started yet
    restarts: int = 0
    gang: str = ""  # of the running attempt; empty between attempts
    attempt_started_at: float = 0.0  # unix seconds, of the running attempt
    ended: tuple[EndedAttempt, ...] = ()  # the last few, oldest first
    stopping: bool = False  # SIGTERM was received: ranks are writing a checkpoint
    ranks: tuple[Heartbeat, ...] = ()
    plan: Plan | None = None  # completed as soon as data and model are known
    started_at: float = 0.0  # unix seconds


class Termination(SchemaModel):
    """The launcher's last word (JSON, <= 4 KiB when serialised)."""

    exit_class: ExitClass
    exit_code: int
    message: str  # one sentence
    hint: str = ""
    guilty_rank: int | None = None
    phase: Phase | None = None
    step: int | None = None
    exception: str = ""
    last_lines: tuple[str, ...] = ()
    checkpoint_step: int | None = None
    checkpoint_uri: str | None = None
    checkpoint_saved_at: float | None = None  # unix seconds
    artifact_uri: str | None = None
    artifact_manifest_sha256: Sha256 | None = None
    artifact_files: int | None = None
    artifact_bytes: int | None = None
    metrics: dict[str, float] = {}  # trainLoss, validationLoss, baseValidationLoss, tokensPerSecond
    gang: str = ""  # of the attempt that this end belongs to; empty: none was running
    resumed_from_step: int | None = None  # where that attempt's training began; None: it never trained
    ended: tuple[EndedAttempt, ...] = ()  # the last few attempts, this one included, oldest first
    plan: Plan | None = None  # completed; dropped first when the message would exceed 4 KiB


class FileEntry(SchemaModel):
    path: str  # relative to the manifest
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class CheckpointManifest(SchemaModel):
    """``<checkpointPrefix>step-00000200/manifest.json``, written last: without it the checkpoint does not exist."""

    schema_version: Literal[1] = 1
    step: int
    epoch: float
    samples_seen: int
    tokens_seen: int
    config_digest: Sha256  # of what defines the result: a checkpoint of another job is refused
    world_size: int
    strategy: str
    state: dict[str, Any] = {}  # small JSON state: schedule, scaler, early stopping, history digest
    files: tuple[FileEntry, ...]
    saved_at: str


class ArtifactManifest(SchemaModel):
    """``manifest.json`` of a published artifact, written last and read back."""

    schema_version: Literal[1] = 1
    job: dict[str, str]
    format: str
    base_model: dict[str, Any]  # uri, revision, config sha256, licence where known
    dataset: dict[str, Any]  # digests, counts
    seed: int
    versions: dict[str, str]
    config: dict[str, Any]  # the spec
    plan: dict[str, Any]
    metrics: dict[str, float]
    files: tuple[FileEntry, ...]
    created_at: str


class StepRecord(SchemaModel):
    """One optimizer step of the report's history."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float | None = None
    tokens: int  # tokens processed in this step, whole job
    supervised_tokens: int  # tokens that carried loss
    seconds: float
    memory_bytes: int = 0


class EvaluationRecord(SchemaModel):
    step: int
    loss: float
    token_accuracy: float
    supervised_tokens: int
    seconds: float


class SampleRecord(SchemaModel):
    """One validation prompt answered by the base model and by the tuned one (greedy)."""

    prompt: str
    reference: str
    before: str
    after: str


class Report(SchemaModel):
    """``report.json``: what a job tells its owner. ``report.html`` is rendered from it alone."""

    schema_version: Literal[1] = 1
    job: dict[str, str]
    plan: Plan
    spec: dict[str, Any]
    environment: dict[str, str]
    dataset: dict[str, Any]  # counts: samples, tokens, dropped, truncated, masked-token share, digests
    self_check: tuple[dict[str, Any], ...]  # one entry per rank
    steps: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]  # the first one is the base model (step 0) where validation exists
    samples: tuple[SampleRecord, ...] = ()
    attempts: tuple[dict[str, Any], ...] = ()  # resumedFromStep, skipped checkpoints with reasons
    best_step: int | None = None
    stopped_early: bool = False
    metrics: dict[str, float] = {}
    artifact: dict[str, Any] = {}
    started_at: str = ""
    finished_at: str = ""
    seconds: float = 0.0


class JobResult(SchemaModel):
    """Rank 0's last word to its launcher: ``<work>/result.json``."""

    artifact_uri: str
    artifact_manifest_sha256: Sha256
    artifact_files: int
    artifact_bytes: int
    report_uri: str
    report_directory: str  # local copy of report.json and report.html
    metrics: dict[str, float]
    step: int
    stopped_early: bool = False
