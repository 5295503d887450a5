"""The client beside a real operator, real pods and real object storage: one life of a job seen through `finetune`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from deploy.local.cluster import tools
from tests.cluster.cluster import LocalCluster, undisturbed
from tests.cluster.recording import Recorder
from tests.cluster.workshop import (
    EVERY,
    FILES,
    GRACE_SECONDS,
    Adapter,
    Workshop,
    held,
    steps,
    storage_environment,
    workshop,
)

COMMAND = str(Path(sys.executable).with_name("finetune"))


class Terminal:
    """Where a user of the cluster types, with the credentials of the bucket in the environment."""

    def __init__(self, shop: Workshop, folder: Path) -> None:
        self.folder = folder
        self.place = ["--namespace", shop.namespace]
        self.environment = shop.cluster.environment | storage_environment(shop.cluster) | {"COLUMNS": "160"}
        self.environment["PATH"] = (
            f"{Path(COMMAND).parent}:{self.environment['PATH']}"  # kubectl looks for plugins there
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *words, *self.place],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, program: str = COMMAND) -> str:
        """What a command that succeeds prints."""
        command = [*program.split(), *words, *self.place]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=330, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout


@dataclass
class Life:
    """What was seen of a job that `finetune run` submitted, waited for and fetched while others asked and paused it."""

    status: dict[str, Any]  # of the job, after all
    result: dict[str, Any]  # what `finetune run` said
    said: dict[str, str]  # by other commands, by their first word
    suspended: dict[str, Any]  # the status then
    freed_seconds: float  # from when the first pod was asked to go until none was left
    adapters: dict[str, Adapter]  # by folder: of `run`, of a later `fetch`
    files: set[str]  # that `run` fetched


@pytest.fixture(scope="module")
def life(product: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("terminal")
    with undisturbed(exclusive=False), workshop(product) as shop:
        return _live(shop, folder)


def _live(shop: Workshop, folder: Path) -> Life:
    terminal = Terminal(shop, folder)
    (folder / "job.yaml").write_text(json.dumps(shop.long_job()))
    run = terminal.start("run", "--on", "kubernetes", "job.yaml", "--directory", "adapter", "--output", "json")
    try:
        shop.wait_step("job", EVERY + 5)
        with held(shop, "job"):
            said = {"list": terminal("list")}
        recorder = Recorder(shop.cluster.layout, shop.namespace)
        suspending = terminal.start("suspend", "job")
        shop.until("job", "keeps its pods", lambda: not shop.pods("job"), 120)
        freed = time.time()
        freed_seconds = freed - _asked_to_go(recorder.stop().versions["pods"])
        complaint = suspending.communicate(timeout=60)[1]
        assert suspending.returncode == 0, complaint
        terminal("wait", "job", "--for", "Suspended", "--timeout", "60s")
        suspended = shop.status("job")
        terminal("resume", "job")
        shop.wait_step("job", suspended["attempts"][-1]["lastStep"] + 1)
        with held(shop, "job"):
            said["logs"] = terminal("logs", "job", "--rank", "1", "--no-follow", "--tail", "20")
            said["status"] = terminal("finetune", "status", "job", program=str(tools.program("kubectl")))
            said["all logs"] = terminal("logs", "job", "--no-follow")
        terminal("wait", "job", "--timeout", "300s")
        output, complaint = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, complaint
    terminal("fetch", "job", "--directory", "again")
    status = shop.status("job")
    terminal("cancel", "job", "--yes")
    terminal("wait", "job", "--for", "Deleted", "--timeout", "60s")
    adapters = {name: {file: (folder / name / file).read_bytes() for file in FILES} for name in ("adapter", "again")}
    files = {path.name for path in (folder / "adapter").iterdir()}
    return Life(status, json.loads(output), said, suspended, freed_seconds, adapters, files)


def _asked_to_go(versions: list[dict[str, Any]]) -> float:
    """When the first of the pods was asked to go (whole seconds, rounded down)."""
    leaving = [pod["metadata"] for pod in versions if "deletionTimestamp" in pod["metadata"]]
    ends = [(datetime.fromisoformat(each["deletionTimestamp"]), each) for each in leaving]
    return min(end.timestamp() - each["deletionGracePeriodSeconds"] for end, each in ends)


def test_a_job_is_run_watched_paused_and_fetched_with_the_client_alone(life: Life) -> None:
    assert "Running" in life.said["list"]
    for part in ("2 ranks (2 nodes x 1)", "strategy      DDP, method LoRA", "attempts", "conditions"):
        assert part in life.said["status"], life.said["status"]
    assert life.said["logs"].strip()
    assert "step" in life.said["all logs"]
    assert (life.result["exitClass"], life.result["step"]) == ("Completed", steps())
    assert {*FILES, "report.json"} <= life.files
    assert life.adapters["again"] == life.adapters["adapter"]


def test_a_suspended_job_frees_its_pods_within_the_grace_period_and_continues_to_the_same_adapter(
    life: Life, calm: Adapter
) -> None:
    (paused,) = life.suspended["attempts"]
    attempts = life.status["attempts"]
    print(f"suspended at step {paused['lastStep']}, no pod after {life.freed_seconds:.1f} s")
    assert life.freed_seconds <= GRACE_SECONDS
    assert EVERY <= life.suspended["checkpoint"]["step"] <= paused["lastStep"] < steps()
    assert [attempt["cause"] for attempt in attempts] == ["Suspended", "Completed"]
    assert [attempt["resumedFromStep"] for attempt in attempts] == [0, attempts[0]["lastStep"]], "not a step was lost"
    assert attempts[0]["lastStep"] >= paused["lastStep"], "a resume tells it where nobody heard the pods' last words"
    assert life.adapters["adapter"] == calm
