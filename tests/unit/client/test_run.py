"""`finetune run`: real jobs on this machine, from manifest to artifact."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, Any

import pytest
from tests.builders import build_model, conversations, write_jsonl
from tests.unit.client.client_rig import COMMAND, environment, finetune, write_manifest

from finetune.local import finished_before
from finetune.manifests import read_job
from finetune_storage import ObjectStore, find_artifact

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and data; every test writes its own manifest beside them."""
    made = tmp_path_factory.mktemp("jobs")
    build_model(made / "model")
    write_jsonl(made / "train.jsonl", conversations(48))
    return made


def training(**changes: Any) -> dict[str, Any]:
    return {"globalBatchSize": 4, "precision": "FP32", **changes}


def test_a_run_ends_with_a_verified_artifact_and_one_json_object_and_is_not_repeated(folder: Path) -> None:
    write_manifest(folder / "first.yaml", name="first", training=training(maxSteps=6))
    ended = finetune("run", "first.yaml", "--output", "json", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert set(result) >= {
        "state",
        "exitClass",
        "message",
        "artifacts",
        "metrics",
        "reportPath",
        "runDirectory",
        "plan",
    }
    assert (result["state"], result["exitClass"], result["step"]) == ("Completed", "Completed", 6)
    assert result["plan"]["totalSteps"] == 6
    artifacts = result["artifacts"]
    _, manifest, sha256 = find_artifact(ObjectStore.open(artifacts["uri"]))
    assert sha256 == artifacts["manifestSha256"]
    assert manifest.job["name"] == "first"
    assert Path(result["reportPath"]).read_text(encoding="utf-8").startswith("<!")
    assert re.search(r"^done, step 6/6, loss \d\.\d{4}, validation loss \d\.\d{4}\b", ended.stderr, re.M), ended.stderr
    assert "\x1b" not in ended.stderr

    shown = finetune("report", result["runDirectory"], cwd=folder)
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[-1] == f"report: {result['reportPath']}"
    from_store = finetune("report", artifacts["uri"], cwd=folder)
    assert from_store.stdout.splitlines()[:-1] == shown.stdout.splitlines()[:-1]

    again = finetune("run", "first.yaml", "--output", "json", cwd=folder)
    assert (again.returncode, json.loads(again.stdout)) == (0, result)
    assert again.stderr.startswith("already complete: this manifest was trained before; nothing was done\n")


@pytest.mark.parametrize("text", ["", '{"state": "Compl', '{"state": "Completed", "mood": "good"}'])
def test_a_result_that_cannot_be_read_stands_in_nobodys_way(folder: Path, text: str) -> None:
    """A full disk or a lost power supply cut it short, or another version wrote it."""
    job = read_job(str(write_manifest(folder / "unread.yaml", name="unread")))
    (folder / "result.json").write_text(text)
    assert finished_before(folder, job) is None


def test_ctrl_c_writes_a_checkpoint_says_how_to_go_on_and_the_next_run_resumes(folder: Path) -> None:
    manifest = write_manifest(folder / "long.yaml", name="long", training=training(maxSteps=100_000, learningRate=1e-3))
    running = subprocess.Popen(
        [COMMAND, "run", "long.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert running.stderr is not None
    shown = first_line_with(running.stderr, "training, step ")
    assert re.fullmatch(r"training, step \d+/100000(, .*)?\n", shown)
    step = wait_for_step(folder, 3)
    twice = finetune("run", "long.yaml", cwd=folder)
    assert twice.returncode == 10
    assert re.fullmatch(
        rf"this job is already running here \(process {running.pid}, {folder}/\.finetune/runs/default/long/\w+\);"
        r" wait for it, or stop it with Ctrl-C in its terminal\n",
        twice.stderr,
    )
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "stopping: the ranks write a checkpoint first (Ctrl-C again kills them now)" in errors
    state, logs, remedy = output.splitlines()
    saved = re.fullmatch(r"Interrupted: stopped from outside; the newest checkpoint is of step (\d+)", state)
    assert saved is not None
    assert int(saved[1]) >= step
    assert logs.startswith(f"logs: {folder}/.finetune/runs/default/long/")
    assert remedy == "to go on from the newest checkpoint: finetune run long.yaml"

    first_seen = resumed_at(folder, manifest)
    assert first_seen >= int(saved[1])


def first_line_with(stream: IO[str], words: str) -> str:
    """Read on until a line says them; the stream's end is a failure."""
    seen = []
    for line in stream:
        if words in line:
            return line
        seen.append(line)
    raise AssertionError(f"no line says {words!r}: {''.join(seen)}")


def resumed_at(folder: Path, manifest: Path) -> int:
    """Start the same job again, return the first step it counts, and stop it by SIGTERM (143)."""
    for stale in folder.glob(".finetune/runs/default/long/*/node-0/ranks/*"):
        stale.unlink()
    running = subprocess.Popen(
        [COMMAND, "run", manifest], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    step = wait_for_step(folder, 1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=120)
    assert running.returncode == 143
    return step


def wait_for_step(folder: Path, least: int) -> int:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for path in folder.glob(".finetune/runs/default/long/*/node-0/ranks/0.json"):
            try:
                beat = json.loads(path.read_text())
            except (FileNotFoundError, ValueError):
                continue
            if beat["phase"] == "Training" and beat.get("step", 0) >= least:
                return int(beat["step"])
        time.sleep(0.1)
    raise AssertionError("no step within 200 s")


def test_broken_data_ends_in_one_sentence_before_any_rank_starts(folder: Path) -> None:
    write_jsonl(folder / "bad.jsonl", [*conversations(5), {"messages": "no list"}])
    write_manifest(folder / "bad.yaml", name="bad", dataset={"train": [{"uri": "file://./bad.jsonl"}]})
    ended = finetune("run", "bad.yaml", "--output", "json", cwd=folder)
    assert ended.returncode == 11
    result = json.loads(ended.stdout)
    assert (result["state"], result["exitClass"]) == ("Failed", "InvalidData")
    assert "bad.jsonl" in result["message"]
    assert "artifacts" not in result or result["artifacts"] is None
    assert "Traceback" not in ended.stderr
    assert not (folder / "out/default/bad").exists()
    assert not list((Path(result["runDirectory"]) / "node-0").glob("logs/attempt-*"))


def test_two_nodes_run_as_two_launchers_with_a_live_bar_in_a_terminal(folder: Path) -> None:
    write_manifest(folder / "nodes.yaml", name="nodes", training=training(maxSteps=5), distributed={"nodes": 2})
    leader, follower = pty.openpty()
    running = subprocess.Popen(
        [COMMAND, "run", "nodes.yaml", "--output", "json"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=follower,
        env={**environment(), "TERM": "xterm"},
    )
    os.close(follower)
    drawn = read_all(leader)
    assert running.stdout is not None
    result = json.loads(running.stdout.read())
    assert running.wait(timeout=30) == 0, drawn
    assert (result["state"], result["plan"]["nodes"], result["plan"]["worldSize"]) == ("Completed", 2, 2)
    work = Path(result["runDirectory"])
    assert (work / "node-0/logs/attempt-1/rank-0.log").exists()
    assert (work / "node-1/logs/attempt-1/rank-1.log").exists()
    assert "step 5/5" in drawn
    assert "\x1b[" in drawn  # drawn in place, not scrolled


def read_all(descriptor: int) -> str:
    """Everything a terminal shows until its last writer is gone."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # how Linux tells the end of a pseudo terminal
            break
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return b"".join(parts).decode(errors="replace")
