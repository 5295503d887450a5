"""Killed or stopped at a random step, a job ends with the very bytes of the undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.training.jobs import ENGINES, METHODS, Ground, Job, largest_difference, rank_environment

from finetune_api.trainer_config import Rendezvous
from finetune_trainer.progress import read_heartbeats

SETTINGS = {
    "training": {"maxSteps": 40, "globalBatchSize": 16, "precision": "FP32", "learningRate": 3e-3},
    "checkpoint": {"everySteps": 7},
}
LONG = {  # a job that is stopped and killed on its way must not end before, however late it is done
    "training": {**SETTINGS["training"], "maxSteps": 120},
    "checkpoint": {"everySteps": 23},
}
COMBINATIONS = [("DDP", "LoRA"), ("FSDP", "QLoRA"), ("ZeRO-1", "Full"), ("ZeRO-2", "LoRA"), ("ZeRO-3", "QLoRA")]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("engine", "method"), COMBINATIONS)
def test_a_stopped_launcher_and_then_a_killed_rank_change_no_byte_of_the_result(
    ground: Ground, engine: str, method: str
) -> None:
    reference = Job("undisturbed", METHODS[method], ENGINES[engine], LONG)
    expected = ground.run([reference], 2)["undisturbed"]
    chance = random.Random()  # other steps in every run
    job = Job("disturbed", METHODS[method], ENGINES[engine], LONG)

    with started(ground, job) as launcher:
        wait_for_step(ground.work(job), chance.randint(2, 30))
        launcher.send_signal(signal.SIGTERM)
        assert end_of(launcher) == 143
    said = json.loads((ground.work(job) / "termination.json").read_text())
    assert (said["exitClass"], said["checkpointStep"]) == ("Interrupted", said["step"])

    with started(ground, job) as launcher:
        ranks = wait_for_step(ground.work(job), said["step"] + chance.randint(1, 30), resumed_from=said["step"])
        os.kill(ranks[chance.choice([0, 1])].pid, signal.SIGKILL)
        assert end_of(launcher) == 0
    (ended,) = json.loads((ground.work(job) / "termination.json").read_text())["ended"]
    assert (ended["exitClass"], ended["resumedFromStep"]) == ("RankKilled", said["step"])
    assert ended["lastStep"] >= max(beat.step for beat in ranks.values())

    outcome = ground.outcome(job)
    resumed = [attempt["resumedFromStep"] for attempt in outcome.report["attempts"]]
    assert resumed[0] == said["step"], f"stopped at {said['step']}, resumed from {resumed}"
    assert len(resumed) == 2, f"the kill came too late: {resumed}"
    assert "was killed by SIGKILL" in ground.work(job).with_suffix(".log").read_text()
    assert outcome.losses == expected.losses
    assert outcome.weights == expected.weights


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["Full", "QLoRA"])
def test_a_checkpoint_continues_at_another_world_size_with_the_same_losses(ground: Ground, method: str) -> None:
    def job(tag: str, engine: str, **more: Any) -> Job:
        settings = {"training": {"maxSteps": 20, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3}}
        return Job(tag, METHODS[method], ENGINES[engine], settings, **more)

    whole = ground.run([job("whole", "FSDP")], 2)["whole"]
    ground.run([job("a", "FSDP", cut=6, stop_after_cut=True, output="moving")], 2)
    ground.run([job("b", "FSDP", cut=13, stop_after_cut=True, output="moving")], 1)
    moved = ground.run([job("c", "FSDP", output="moving")], 2)["c"]
    assert [attempt["resumedFromStep"] for attempt in moved.report["attempts"]] == [6, 13]
    assert largest_difference(whole.losses, moved.losses) <= 1e-5

    ground.run([job("d", "ZeRO-3", cut=6, stop_after_cut=True, output="changing")], 2)
    ground.run([job("e", "DDP", cut=13, stop_after_cut=True, output="changing")], 1)
    changed = ground.run([job("f", "ZeRO-2", output="changing")], 2)["f"]
    assert largest_difference(whole.losses, changed.losses) <= 1e-5


@pytest.mark.multiprocess
def test_a_checkpoint_taken_at_an_evaluation_carries_the_state_of_every_parameter(ground: Ground) -> None:
    settings = {
        "training": {**SETTINGS["training"], "maxSteps": 8, "precision": "BF16", "evaluateEverySteps": 4},
        "dataset": {"validation": {"fraction": 0.2}},
    }
    jobs = [
        Job(f"{sharding} {method}{cut or ''}", METHODS[method], fsdp(sharding), settings, cut=cut)
        for sharding in ("Full", "Hybrid", "GradientAndOptimizer")
        for method in ("LoRA", "Full")
        for cut in (None, 4)
    ]
    done = ground.run(jobs, 2)
    for whole, cut in zip(jobs[::2], jobs[1::2], strict=True):
        kinds: dict[str, set[str]] = {}
        for file in (ground.folder / "out" / cut.tag.replace(" ", "-")).rglob("step-00000004/*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    name, _, kind = key.rpartition("/")
                    kinds.setdefault(name, set()).add(kind)
        assert kinds, cut.tag
        lacking = [name for name, found in kinds.items() if found != {"weight", "exp_avg", "exp_avg_sq", "step"}]
        assert not lacking, f"{cut.tag}: {len(lacking)} of {len(kinds)} lack state, first {lacking[0]}"
        assert done[cut.tag].report["attempts"][-1]["resumedFromStep"] == 4
        assert done[cut.tag].losses == done[whole.tag].losses, cut.tag


def fsdp(sharding: str) -> dict[str, Any]:
    return {"type": "FSDP", "fsdp": {"sharding": sharding}}


@pytest.mark.multiprocess
def test_a_damaged_checkpoint_is_passed_over_and_named(ground: Ground) -> None:
    settings = {**SETTINGS, "checkpoint": {"everySteps": 5, "keep": 3}}
    whole = ground.run([Job("whole", METHODS["LoRA"], ENGINES["DDP"], settings)], 1)["whole"]
    cut = Job("cut", METHODS["LoRA"], ENGINES["DDP"], settings, cut=17, stop_after_cut=True, output="one")
    ground.run([cut], 1)
    steps = sorted((ground.folder / "out/one").rglob("step-*/state-*.safetensors"))
    assert [path.parent.name for path in steps] == ["step-00000010", "step-00000015", "step-00000017"]
    content = bytearray(steps[2].read_bytes())
    content[len(content) // 2] ^= 1
    steps[2].write_bytes(content)
    steps[1].write_bytes(steps[1].read_bytes()[:-9])
    resumed = ground.run([Job("on", METHODS["LoRA"], ENGINES["DDP"], settings, output="one")], 1)["on"]
    attempt = resumed.report["attempts"][-1]
    assert attempt["resumedFromStep"] == 10
    assert [sentence.split(": ")[0].rsplit("/", 2)[-2] for sentence in attempt["skipped"]] == [
        "step-00000017",
        "step-00000015",
    ]
    assert resumed.weights == whole.weights


@pytest.mark.multiprocess
def test_a_job_that_died_after_its_last_checkpoint_publishes_it_and_saves_nothing_again(ground: Ground) -> None:
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "maxSteps": 6}}
    first = Job("first", METHODS["LoRA"], ENGINES["DDP"], settings, output="one")
    whole = ground.run([first], 1)["first"]

    def checkpoints() -> dict[str, tuple[bytes, int]]:
        files = [path for path in (ground.folder / "out/one").rglob("checkpoints/step-*/*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    saved = checkpoints()
    for path in ground.published(first):
        path.unlink()  # as if it had died in between
    again = ground.run([Job("again", METHODS["LoRA"], ENGINES["DDP"], settings, output="one")], 1)["again"]
    assert [attempt["resumedFromStep"] for attempt in again.report["attempts"]] == [6]
    assert checkpoints() == saved
    assert any(path.name == "latest.json" for path in ground.published(first))
    assert again.weights == whole.weights
    (beat,) = read_heartbeats(ground.work(Job("again", {}, {}))).values()
    assert beat.checkpoint_step == 6
    assert beat.checkpoint_uri == f"file://{next((ground.folder / 'out/one').rglob('step-00000006'))}/"


@pytest.mark.multiprocess
def test_a_checkpoint_with_plain_names_is_continued(ground: Ground) -> None:
    """As versions before the names told the content wrote them."""
    job = Job("cut", METHODS["LoRA"], ENGINES["DDP"], SETTINGS, cut=6, stop_after_cut=True, output="one")
    ground.run([job], 1)
    (directory,) = (ground.folder / "out/one").rglob("step-00000006")
    manifest = directory / "manifest.json"
    text = manifest.read_text()
    for path in [path for path in directory.iterdir() if path != manifest]:
        plain = f"{path.stem.rpartition('-')[0]}{path.suffix}"
        text = text.replace(path.name, plain)
        path.rename(directory / plain)
    manifest.write_text(text)
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "progress.json",
        "state-00000-of-00001.safetensors",
    ]
    resumed = ground.run([Job("on", METHODS["LoRA"], ENGINES["DDP"], SETTINGS, output="one")], 1)["on"]
    assert [attempt["resumedFromStep"] for attempt in resumed.report["attempts"]] == [6]


@contextmanager
def started(ground: Ground, job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """A real launcher with two ranks, as a pod would run it; killed (its ranks die with it) if a test gives up."""
    rendezvous = Rendezvous(endpoint="127.0.0.1:0", minimum_nodes=1, maximum_nodes=1, timeout_seconds=120)
    config = ground.trainer_config(job, 2).model_copy(update={"rendezvous": rendezvous})
    path = ground.work(job).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    with path.with_suffix(".log").open("ab") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "finetune_trainer", "--config", str(path)],
            env=rank_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def wait_for_step(work: Path, step: int, *, resumed_from: int = 0, limit_seconds: float = 180) -> Any:
    """Heartbeats of both ranks once each has done ``step`` steps (or is past training) of an attempt."""
    deadline = time.monotonic() + limit_seconds
    while time.monotonic() < deadline:
        heartbeats = read_heartbeats(work)
        done = [beat.step >= step and beat.resumed_from_step == resumed_from for beat in heartbeats.values()]
        if done == [True, True]:
            return heartbeats
        time.sleep(0.002)
    raise AssertionError(f"step {step} not reached: {read_heartbeats(work)}")


def end_of(launcher: subprocess.Popen[bytes], limit_seconds: float = 240) -> int:
    return launcher.wait(timeout=limit_seconds)
