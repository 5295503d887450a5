"""A job goes on with the base model and the data it began with, or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.builders import build_model
from tests.training.jobs import ENGINES, METHODS, Ground, Job, rank_environment
from tests.unit.trainer.hub import NAME, Hub

from finetune_api.trainer_config import Rendezvous
from finetune_trainer.progress import read_heartbeats

SETTINGS = {
    "training": {"maxSteps": 60, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3},
    "checkpoint": {"everySteps": 4},
}


@pytest.mark.multiprocess
def test_a_push_to_the_hub_between_two_attempts_changes_no_byte_of_the_result(ground: Ground) -> None:
    long = {**SETTINGS, "training": {**SETTINGS["training"], "maxSteps": 300}, "checkpoint": {"everySteps": 40}}
    expected = ground.run([Job("undisturbed", METHODS["LoRA"], ENGINES["DDP"], long)], 1)["undisturbed"]
    job = Job("disturbed", METHODS["LoRA"], ENGINES["DDP"], {**long, "model": {"uri": f"hf://{NAME}"}})
    work = ground.work(job)
    with Hub() as hub:
        commit = hub.push(ground.model)
        launcher = _start(ground, job, hub, "first-node")
        _wait_for_step(work, 1)
        about = json.loads((work / "launcher.json").read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{about['port']}/progress", timeout=5) as page:
            shown = json.loads(page.read())["plan"]["modelRevision"]  # what the operator puts into status.plan
        _wait_for_step(work, 6)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=240) == 143
        assert json.loads((work / "termination.json").read_text())["plan"]["modelRevision"] == commit == shown

        hub.push(build_model(ground.folder / "newer", seed=7))
        shutil.rmtree(work)  # the next attempt is a pod on another node
        assert _start(ground, job, hub, "second-node").wait(timeout=240) == 0
        assert hub.questions == 1

    outcome = ground.outcome(job)
    assert outcome.report["attempts"][0]["resumedFromStep"] >= 6
    assert outcome.weights == expected.weights
    assert outcome.losses == expected.losses
    assert outcome.report["plan"]["modelRevision"] == commit
    assert json.loads((outcome.artifact / "adapter_config.json").read_text())["revision"] == commit
    (manifest,) = [path for path in ground.published(job) if path.name == "manifest.json"]
    assert json.loads(manifest.read_text())["baseModel"]["revision"] == commit


@pytest.mark.multiprocess
def test_data_that_changed_since_the_checkpoint_is_refused_by_name(ground: Ground) -> None:
    def job(tag: str, **more: Any) -> Job:
        return Job(tag, METHODS["LoRA"], ENGINES["DDP"], SETTINGS, output="one", **more)

    ground.run([job("begun", cut=6, stop_after_cut=True)], 2)
    data = ground.folder / "train.jsonl"
    rows = data.read_text()
    data.write_text(rows.replace("question 3:", "question three:"))
    refused = job("refused", fails=True)
    ground.run([refused], 2)
    (checkpoint,) = (ground.folder / "out/one").rglob("step-00000006")
    assert ground.failure(refused) == (
        "CheckpointError",
        f"The checkpoint file://{checkpoint}/ was made from other input: train.jsonl of spec.dataset.train[0] has "
        "changed; input must stay as it is while a job runs: put it back as it was (take a new file away) and run the "
        "job again, or start anew under another name or output.uri.",
    )
    data.write_text(rows)
    done = ground.run([job("restored")], 2)["restored"]
    assert done.report["attempts"][-1]["resumedFromStep"] == 6


@pytest.mark.multiprocess
def test_weights_that_were_overwritten_since_the_checkpoint_are_refused_by_name(ground: Ground) -> None:
    """A base model at an address that says nothing of its content: a directory, or a prefix in object storage."""

    def job(tag: str, **more: Any) -> Job:
        return Job(tag, METHODS["LoRA"], ENGINES["DDP"], SETTINGS, output="one", **more)

    kept = shutil.copytree(ground.model, ground.folder / "kept")
    ground.run([job("begun", cut=6, stop_after_cut=True)], 1)
    newer = build_model(ground.folder / "newer", seed=7)
    shutil.copy(newer / "model.safetensors", ground.model / "model.safetensors")
    refused = job("refused", fails=True)
    ground.run([refused], 1)
    name, message = ground.failure(refused)
    assert (name, message.partition("; ")[0].partition(" was made from ")[2]) == (
        "CheckpointError",
        "other input: model.safetensors of spec.model has changed",
    )
    shutil.copy(kept / "model.safetensors", ground.model / "model.safetensors")
    (ground.model / "README.md").write_text("a document may change\n")
    assert ground.run([job("restored")], 1)["restored"].report["attempts"][-1]["resumedFromStep"] == 6


def _start(ground: Ground, job: Job, hub: Hub, node: str) -> subprocess.Popen[bytes]:
    """A launcher with one rank, on a node with its own cache."""
    rendezvous = Rendezvous(endpoint="127.0.0.1:0", minimum_nodes=1, maximum_nodes=1, timeout_seconds=120)
    cache = ground.folder / node
    changed = {"rendezvous": rendezvous, "cache_directory": str(cache)}
    config = ground.trainer_config(job, 1).model_copy(update=changed)
    path = ground.folder / f"{node}.json"
    path.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    own = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache / "hub"), "HF_ENDPOINT": hub.endpoint}
    with path.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer", "--config", str(path)],
            env={**rank_environment(), **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _wait_for_step(work: Path, step: int, limit_seconds: float = 180) -> None:
    deadline = time.monotonic() + limit_seconds
    while not any(beat.step >= step for beat in read_heartbeats(work).values()):
        assert time.monotonic() < deadline, f"step {step} not reached"
        time.sleep(0.002)
