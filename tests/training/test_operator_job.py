"""What the operator builds is what the trainer runs: a pod's file and variables, handed to a real launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.training.jobs import Ground
from tests.unit.operator.build_shapes import children, container

from finetune_api.exits import ExitClass
from finetune_api.report import Termination
from finetune_operator.build import Children
from finetune_storage import ObjectStore, fetch_artifact

SPEC: dict[str, Any] = {
    "model": {"uri": "pvc://models/model"},
    "dataset": {"train": [{"uri": "s3://bucket/pod/*.jsonl"}], "maxSequenceLength": 128},
    "method": {"type": "LoRA", "lora": {"rank": 2}},
    "training": {"maxSteps": 2, "globalBatchSize": 2, "precision": "FP32"},
    "resources": {"limits": {"cpu": "1"}},
    "output": {"uri": "s3://bucket/pod-out", "credentials": {"secretName": "bucket"}},
}


@pytest.mark.s3
@pytest.mark.multiprocess
def test_a_pod_reads_a_claim_and_a_bucket_with_the_jobs_secret_and_publishes(
    ground: Ground, s3_server: Any, tmp_path: Path
) -> None:
    store = ObjectStore.open("s3://bucket/", environment=s3_server.environment, retry_seconds=5)
    for file in ground.folder.glob("*.jsonl"):
        store.put(f"pod/{file.name}", file)
    built = children(SPEC)
    ended = run_pod(built, tmp_path, {"bucket": s3_server.environment}, {"models": ground.folder})
    assert (ended.exit_class, ended.message) == (ExitClass.COMPLETED, ended.message)
    prefix = "pod-out/team/job/5a3c7c6e-0000-4000-8000-000000000001/"
    fetch_artifact(store.child(prefix), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.multiprocess
def test_a_pod_writes_its_output_on_a_claim_and_names_it_so(ground: Ground, tmp_path: Path) -> None:
    claim = tmp_path / "claim"
    claim.mkdir()
    data = {"train": [{"uri": "pvc://models/train.jsonl"}], "maxSequenceLength": 128}
    built = children(SPEC | {"dataset": data, "output": {"uri": "pvc://work/out"}})
    ended = run_pod(built, tmp_path, {}, {"models": ground.folder, "work": claim})
    assert ended.exit_class is ExitClass.COMPLETED, ended.message
    assert ended.artifact_uri is not None
    assert ended.artifact_uri.startswith("pvc://work/out/team/job/5a3c7c6e-0000-4000-8000-000000000001/artifacts/")
    assert list((claim / "out").rglob("adapter_model.safetensors")) != []


def run_pod(built: Children, folder: Path, secrets: dict[str, dict[str, str]], claims: dict[str, Path]) -> Termination:
    """Plays the kubelet for one pod, as far as one machine can: other paths, the same file and variables."""
    config = json.loads(built.config_map["data"]["trainer.json"])
    last_words = folder / "termination-log"
    config |= {
        "workDirectory": str(folder / "work" / "run"),
        "cacheDirectory": str(folder / "work" / "cache"),
        "terminationMessagePath": str(last_words),
        "metricsPort": 0,
        "rendezvous": config["rendezvous"] | {"endpoint": "127.0.0.1:0"},
    }
    path = folder / "trainer.json"
    path.write_text(json.dumps(config))
    mounts = folder / "claims"
    mounts.mkdir()
    for name, directory in claims.items():
        (mounts / name).symlink_to(directory)
    environment = {"PATH": os.environ["PATH"], **environment_of(container(built), secrets)}
    environment |= {"HOME": str(folder), "TMPDIR": str(folder), "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    environment |= {"FINETUNE_CLAIMS_DIRECTORY": str(mounts), "JOB_COMPLETION_INDEX": "0"}
    command = [*container(built)["command"][:-1], str(path)]
    command[0] = sys.executable
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert last_words.exists(), done.stderr[-4000:]
    ended = Termination.model_validate_json(last_words.read_text())
    assert done.returncode == ended.exit_code
    for values in secrets.values():
        assert values["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr + last_words.read_text()
    return ended


def environment_of(pod: dict[str, Any], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """As the kubelet makes it: ``envFrom`` first, then ``env`` over it."""
    found: dict[str, str] = {}
    for source in pod.get("envFrom", []):
        found |= {source["prefix"] + key: value for key, value in secrets[source["secretRef"]["name"]].items()}
    for entry in pod["env"]:
        reference = entry.get("valueFrom", {}).get("secretKeyRef")
        if "value" in entry:
            found[entry["name"]] = entry["value"]
        elif reference and reference["key"] in secrets[reference["name"]]:
            found[entry["name"]] = secrets[reference["name"]][reference["key"]]
    return found
