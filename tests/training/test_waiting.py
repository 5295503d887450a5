"""Ranks wait for one of them that publishes longer than any collective may last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.training.jobs import ENGINES, METHODS, Ground, Job, rank_environment

TIMEOUT_SECONDS = 20
SLOW = f"""
import json, os, sys, time, traceback
from pathlib import Path
from finetune_trainer import publication
from finetune_trainer.distributed import join_process_group
from finetune_trainer.worker_config import WorkerConfig
from tests.training import driver

publish = publication.publish_job
def slowly(run, directory):
    time.sleep({TIMEOUT_SECONDS + 10})
    return publish(run, directory)
publication.publish_job = slowly

context = join_process_group("cpu", {TIMEOUT_SECONDS})
try:
    driver.run(WorkerConfig.model_validate_json(Path(sys.argv[1]).read_text()), context, None)
except BaseException:
    traceback.print_exc()
    os._exit(1)
Path(sys.argv[1]).with_name(f"completed-{{context.rank}}").touch()
os._exit(0)
"""


@pytest.mark.multiprocess
def test_a_publication_may_take_longer_than_a_collective(ground: Ground) -> None:
    job = Job(
        "slow",
        METHODS["LoRA"],
        ENGINES["DDP"],
        {"training": {"maxSteps": 2, "globalBatchSize": 4, "precision": "FP32"}},
    )
    config, script = ground.folder / "worker.json", ground.folder / "slow.py"
    config.write_text(ground.worker_config(job, 2).model_dump_json(by_alias=True))
    script.write_text(SLOW)
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(config),
        ],
        env={**rank_environment(), "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in ground.folder.glob("completed-*")) == ["completed-0", "completed-1"]
    (latest,) = [path for path in ground.published(job) if path.name == "latest.json"]
    assert json.loads(latest.read_text())
