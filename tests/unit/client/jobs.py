"""FineTuneJobs as an API server returns them, with statuses made of the operator's own types."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune.cluster.job import Job, read_job_object
from finetune_api.status import (
    Condition,
    FineTuneJobStatus,
    StatusArtifacts,
    StatusAttempt,
    StatusCheckpoint,
    StatusDecision,
    StatusMetrics,
    StatusPlan,
    StatusProgress,
)

NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
SHA256 = "ab" * 32


def at(seconds_ago: float) -> str:
    return (NOW - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(
    kind: str, status: str = "True", reason: str = "", message: str = "", seconds_ago: float = 60
) -> Condition:
    return Condition(
        type=kind,
        status=status,
        reason=reason or kind,
        message=message,
        observed_generation=1,
        last_transition_time=at(seconds_ago),
    )


def plan(**changes: Any) -> StatusPlan:
    fields: dict[str, Any] = {
        "world_size": 4,
        "strategy": "FSDP full shard",
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "total_steps": 1170,
        "decisions": (
            StatusDecision(field="training.microBatchSize", value="2", reason="the largest that fits"),
            StatusDecision(field="distributed.strategy.type", value="FSDP", reason="several ranks share one model"),
        ),
    }
    return StatusPlan(**(fields | changes))


def progress(**changes: Any) -> StatusProgress:
    fields: dict[str, Any] = {
        "phase": "Training",
        "step": 420,
        "epoch": "1.08",
        "loss": "1.31",
        "tokens_per_second": 2913,
        "eta_seconds": 2280,
        "updated_at": at(4),
    }
    return StatusProgress(**(fields | changes))


def running(**changes: Any) -> FineTuneJobStatus:
    """The second attempt of a job trains."""
    fields: dict[str, Any] = {
        "observed_generation": 1,
        "state": "Running",
        "message": "step 420 of 1170, loss 1.31, 2,913 tokens/s, about 38 min left",
        "plan": plan(),
        "progress": progress(),
        "attempts": (
            StatusAttempt(
                number=1,
                started_at=at(1500),
                ended_at=at(900),
                cause="RankKilled",
                exit_code=31,
                resumed_from_step=0,
                last_step=217,
                lost_steps=17,
                pod="ftj-bot-1-abcde",
                node="n2",
                message="rank 3 was killed by SIGKILL",
            ),
            StatusAttempt(number=2, started_at=at(890), resumed_from_step=200),
        ),
        "total_attempts": 2,
        "checkpoint": StatusCheckpoint(step=400, uri="s3://adapters/bot/checkpoints/step-00000400/", saved_at=at(90)),
        "conditions": (condition("Accepted"), condition("Running", reason="Training", message="all ranks train")),
    }
    return FineTuneJobStatus(**(fields | changes))


def complete(uri: str = "s3://adapters/bot/", sha256: str = SHA256) -> FineTuneJobStatus:
    return FineTuneJobStatus(
        state="Complete",
        message="completed after 1170 steps",
        plan=plan(),
        progress=progress(step=1170, eta_seconds=0, phase="Done"),
        artifacts=StatusArtifacts(uri=uri, manifest_sha256=sha256, files=3, bytes=33_554_432),
        metrics=StatusMetrics(train_loss="1.12", validation_loss="1.20"),
        conditions=(condition("Accepted"), condition("Complete")),
    )


def failed(reason: str = "InvalidData", message: str = "train.jsonl:7 is not a conversation") -> FineTuneJobStatus:
    return FineTuneJobStatus(
        state="Failed", message=message, conditions=(condition("Accepted"), condition("Failed", reason=reason))
    )


def dump(status: FineTuneJobStatus) -> dict[str, Any]:
    content: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def raw_job(status: FineTuneJobStatus | None = None, name: str = "bot", **metadata: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "generation": 1,
            "creationTimestamp": at(1800),
            **metadata,
        },
        "spec": {
            "method": {"type": "QLoRA"},
            "distributed": {"nodes": 2, "processesPerNode": 2},
            "output": {"uri": "s3://adapters"},
        },
    }
    return raw | ({"status": dump(status)} if status is not None else {})


def make_job(status: FineTuneJobStatus | None = None, name: str = "bot", **metadata: Any) -> Job:
    return read_job_object(raw_job(status, name, **metadata))
