"""The last phase of a job: artifact files, model card, report, verified publication."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune_api.digest import training_digest
from finetune_api.report import JobResult, Report
from finetune_storage import ObjectStore
from finetune_trainer.checkpoint import CheckpointReader
from finetune_trainer.export import export
from finetune_trainer.model_card import model_card
from finetune_trainer.model_files import describe_base_model
from finetune_trainer.publish import ArtifactDescription, PublishedArtifact, package_versions, publish
from finetune_trainer.report import write_report

if TYPE_CHECKING:
    from finetune_trainer.recipe import Run


def publish_job(run: Run, checkpoint_directory: Path) -> JobResult:
    """Export from the checkpoint, render card and report, publish, verify. Rank 0 only."""
    job, state = run.job, run.state
    work = Path(job.work_directory)
    artifact_directory, report_directory = work / "artifact", work / "report"
    export(run.config, run.loaded, CheckpointReader(checkpoint_directory), artifact_directory)
    metrics = job_metrics(run)
    description = _description(run, metrics)
    (artifact_directory / "README.md").write_text(model_card(job, description))
    report = build_report(run, metrics, artifact_directory)
    files = write_report(report, report_directory)
    store = ObjectStore.open_location(job.spec.output.model_copy(update={"uri": run.plan.artifact_prefix}))
    extra = {"report.json": files.json_path, "report.html": files.html_path}
    published: PublishedArtifact = publish(store, artifact_directory, description, extra)
    return JobResult(
        artifact_uri=published.uri,
        artifact_manifest_sha256=published.manifest_sha256,
        artifact_files=published.files,
        artifact_bytes=published.bytes,
        report_uri=f"{published.uri.rstrip('/')}/report.html",
        report_directory=str(report_directory),
        metrics=metrics,
        step=state.step,
        stopped_early=state.stopped_early,
    )


def job_metrics(run: Run) -> dict[str, float]:
    """Headline numbers: last losses, base and published validation loss, throughput."""
    state = run.state
    last = state.steps[-min(len(state.steps), max(1, len(state.steps) // 20)) :]
    metrics = {"trainLoss": sum(s.loss for s in last) / len(last)}
    if state.evaluations:
        metrics["baseValidationLoss"] = state.evaluations[0].loss
        shown = [e for e in state.evaluations if e.step == (state.best_step or state.step)]
        chosen = shown[-1] if shown else state.evaluations[-1]
        metrics["validationLoss"] = chosen.loss
        metrics["validationTokenAccuracy"] = chosen.token_accuracy
    seconds = sum(s.seconds for s in state.steps)
    metrics["tokensPerSecond"] = sum(s.tokens for s in state.steps) / max(seconds, 1e-9)
    return metrics


def build_report(run: Run, metrics: dict[str, float], artifact_directory: Path) -> Report:
    """Everything the owner should know, from the state of the run."""
    job, state = run.job, run.state
    now = time.time()
    seconds = state.seconds + time.monotonic() - run.started
    listing = [{"path": path.name, "bytes": path.stat().st_size} for path in sorted(artifact_directory.iterdir())]
    return Report(
        job={"namespace": job.job.namespace, "name": job.job.name, "uid": job.job.uid},
        plan=run.plan,
        spec=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        environment=environment(run.context.device),
        dataset={**run.data.counts, "digest": run.data.facts.digest},
        self_check=tuple(run.self_check),
        steps=tuple(state.steps),
        evaluations=tuple(state.evaluations),
        samples=tuple(state.samples),
        attempts=tuple(state.attempts),
        best_step=state.best_step,
        stopped_early=state.stopped_early,
        metrics=metrics,
        artifact={"prefix": run.plan.artifact_prefix, "files": listing},
        started_at=datetime.fromtimestamp(now - seconds, UTC).isoformat(timespec="seconds"),
        finished_at=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        seconds=seconds,
    )


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware of rank 0."""
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        **package_versions(),
        "platform": platform.platform(),
        "device": hardware,
        "cpus": str(os.cpu_count()),
        "threadsPerRank": str(torch.get_num_threads()),
    }


def _description(run: Run, metrics: dict[str, float]) -> ArtifactDescription:
    job = run.job
    facts = run.data.facts
    return ArtifactDescription(
        job={
            "namespace": job.job.namespace,
            "name": job.job.name,
            "uid": job.job.uid,
            "configDigest": training_digest(job.spec),
        },
        format=run.plan.output_format.value,
        base_model=describe_base_model(job, Path(run.config.model_directory)),
        dataset={
            "digest": facts.digest,
            "trainSamples": facts.train_samples,
            "validationSamples": facts.validation_samples,
            "trainTokens": facts.train_tokens,
        },
        seed=job.spec.training.seed,
        config=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        plan=run.plan.model_dump(mode="json", by_alias=True, exclude_none=True),
        metrics=metrics,
    )
