"""Starts real launchers with real ranks. The ranks are small scripts that do one thing each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.local import free_port
from finetune_api.plan import Plan
from finetune_api.report import Phase, Progress, Termination
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig

# What every rank script starts with. `barrier` is one real collective over gloo.
PRELUDE = """
import json, os, pathlib, signal, sys, time
from finetune_api.exits import ExitClass
from finetune_api.report import Phase, RankEnd
from finetune_trainer.progress import HeartbeatWriter, StopSignal
RANK, LOCAL, WORLD = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
RESTART = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
WORK = pathlib.Path(json.loads(pathlib.Path(sys.argv[1]).read_text())["trainer"]["workDirectory"])
stop = StopSignal()
beat = HeartbeatWriter(WORK, RANK, LOCAL)

def end(exit_class, message="", **more):
    beat.end(RankEnd(rank=RANK, exit_class=exit_class, step=beat.latest.step, phase=beat.latest.phase,
                     message=message, **more))
    os._exit(exit_class.code)

def connect():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    return dist

def until_stopped():
    while not stop.requested:
        time.sleep(0.02)

def succeed():
    if RANK == 0:
        from finetune_api.report import JobResult
        result = JobResult(artifact_uri="file:///out/", artifact_manifest_sha256="0" * 64, artifact_files=3,
                           artifact_bytes=99, report_uri="file:///out/report", report_directory="/out",
                           metrics={"trainLoss": 1.5}, step=beat.latest.step)
        (WORK / "result.json").write_text(result.model_dump_json(by_alias=True))
    end(ExitClass.COMPLETED)
"""

# A launcher whose ranks are the given script and whose preparation is already done.
LAUNCHER = """
import functools, logging, os, sys
from pathlib import Path
from finetune_trainer import attempts
from finetune_trainer.launcher import Launcher, become_reaper, read_config
from finetune_trainer.stopping import StopRequest
from finetune_trainer.worker_config import WorkerConfig
logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)

def prepare(config, status):
    if os.environ.get("PREPARE_SECONDS"):
        import time
        time.sleep(float(os.environ["PREPARE_SECONDS"]))
    return WorkerConfig(trainer=config, model_directory="", data_directory="",
                        log_directory=str(Path(config.work_directory) / "logs"))

# On a busy machine the news of who is guilty may take longer to come from the other launcher than 3 s.
attempts.AgentSettings = functools.partial(attempts.AgentSettings, settle_seconds=60.0)

if os.environ.get("SLOW_LOOKS"):  # held up after every look of the first attempt, until another launcher waits
    import time
    from finetune_trainer.agent import TrainerAgent
    look = TrainerAgent._monitor_workers

    def look_slowly(self, group):
        seen = look(self, group)
        while self.status.attempt == 1 and not group.spec.rdzv_handler.num_nodes_waiting():
            time.sleep(0.05)
        return seen

    TrainerAgent._monitor_workers = look_slowly

stop = StopRequest()
stop.install()
become_reaper()
launcher = Launcher(read_config(Path(sys.argv[1])), int(sys.argv[2]), stop, prepare, (sys.executable, sys.argv[3]))
sys.exit(launcher.run())
"""


def plan(nodes: int, ranks: int) -> Plan:
    return Plan.model_validate(
        {
            "worldSize": nodes * ranks,
            "nodes": nodes,
            "processesPerNode": ranks,
            "device": "cpu",
            "strategy": {"type": "DDP", "label": "DDP"},
            "method": "LoRA",
            "precision": "FP32",
            "microBatchSize": 1,
            "gradientAccumulationSteps": 1,
            "globalBatchSize": nodes * ranks,
            "gradientCheckpointing": "None",
            "outputFormat": "Adapter",
            "artifactPrefix": "file:///out/",
            "checkpointPrefix": "file:///out/checkpoints/",
        }
    )


def spec(max_restarts: int) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "file:///model"},
            "dataset": {"train": [{"uri": "file:///data.jsonl"}]},
            "method": {"type": "LoRA"},
            "output": {"uri": "file:///out"},
            "runPolicy": {"maxRestarts": max_restarts},
        }
    )


@dataclass
class Node:
    """One running launcher."""

    process: subprocess.Popen[str]
    work: Path

    def wait(self, timeout: float = 240.0) -> int:
        self.output, self.errors = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def termination(self) -> Termination:
        return Termination.model_validate_json((self.work / "termination.json").read_text())

    def launcher_file(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.work / "launcher.json").read_text())
        return content

    def get(self, page: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.launcher_file()['port']}{page}", timeout=60) as answer:
            return str(answer.read().decode())

    def progress(self) -> Progress:
        return Progress.model_validate_json(self.get("/progress"))

    def wait_for_phase(self, phase: Phase, ranks: int = 1) -> Progress:
        """Until ``ranks`` ranks of this node say that they are in ``phase``."""
        return self.wait_for(lambda progress: sum(beat.phase == phase for beat in progress.ranks) >= ranks, phase)

    def wait_for(self, condition: Callable[[Progress], bool], what: str) -> Progress:
        """The first progress page that is as ``condition`` wants it. Generous: ranks import torch, on two cores."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.communicate()
            if (self.work / "launcher.json").exists():
                progress = self.progress()
                if condition(progress):
                    return progress
            time.sleep(0.05)
        raise AssertionError(f"no {what} within 180 s")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass
class Rig:
    """A job whose ranks run ``script``."""

    directory: Path
    script: str
    nodes: int = 1
    ranks: int = 2
    max_restarts: int = 3
    grace_seconds: int = 20
    rendezvous_seconds: int = 120
    endpoint: str = ""
    environment: dict[str, str] | None = None

    def start(self, node_rank: int = 0) -> Node:
        port = 0 if self.nodes == 1 else free_port()  # nobody else can take a port that is bound as it is chosen
        self.endpoint = self.endpoint or f"127.0.0.1:{port}"
        work = self.directory / f"node-{node_rank}"
        config = TrainerConfig(
            job=JobIdentity(name="job", uid="0" * 16),
            spec=spec(self.max_restarts),
            plan=plan(self.nodes, self.ranks),
            rendezvous=Rendezvous(
                endpoint=self.endpoint,
                minimum_nodes=self.nodes,
                maximum_nodes=self.nodes,
                timeout_seconds=self.rendezvous_seconds,
            ),
            work_directory=str(work),
            cache_directory=str(self.directory / "cache"),
            metrics_port=0,
            termination_grace_seconds=self.grace_seconds,
        )
        files = {
            f"trainer-{node_rank}.json": config.model_dump_json(by_alias=True),
            "rank.py": PRELUDE + textwrap.dedent(self.script),
            "launch.py": LAUNCHER,
        }
        for name, text in files.items():
            (self.directory / name).write_text(text)
        (work / "launcher.json").unlink(missing_ok=True)
        process = subprocess.Popen(
            [
                sys.executable,
                self.directory / "launch.py",
                self.directory / f"trainer-{node_rank}.json",
                str(node_rank),
                self.directory / "rank.py",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(self.environment or {})},
            start_new_session=True,
        )
        return Node(process, work)

    def run(self) -> tuple[int, Node]:
        """One node, from start to end."""
        node = self.start()
        return node.wait(), node
