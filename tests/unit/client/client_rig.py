"""Runs the real ``finetune`` command on small real jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

COMMAND = str(Path(sys.executable).with_name("finetune"))


def finetune(*arguments: str | Path, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command's exit code and output."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        timeout=400,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def write_manifest(path: Path, name: str = "tiny", **changes: Any) -> Path:
    """A LoRA job on ``file://./model`` and ``file://./train.jsonl`` beside the manifest; ``changes`` go into spec."""
    spec: dict[str, Any] = {
        "model": {"uri": "file://./model"},
        "dataset": {"train": [{"uri": "file://./train.jsonl"}], "validation": {"fraction": 0.1}},
        "method": {"type": "LoRA"},
        "training": {"maxSteps": 6, "globalBatchSize": 4, "precision": "FP32"},
        "output": {"uri": "file://./out"},
    }
    spec["dataset"]["maxSequenceLength"] = 128
    for field, value in changes.items():
        spec[field] = {**spec.get(field, {}), **value}
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(manifest, file)
    return path
