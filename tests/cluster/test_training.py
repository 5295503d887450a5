"""Jobs on two real nodes: every engine from `kubectl apply` to a verified adapter, the same numbers as a local run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cluster.workshop import Workshop
from tests.training.jobs import largest_difference

PAIRS = [
    pytest.param("LoRA", "DDP", id="DDP and LoRA"),
    pytest.param("QLoRA", "FSDP", id="FSDP and QLoRA"),
    pytest.param("LoRA", "ZeRO-2", id="ZeRO-2 and LoRA"),
    pytest.param("QLoRA", "ZeRO-3", id="ZeRO-3 and QLoRA"),
    pytest.param("Full", "ZeRO-3 offloaded", id="ZeRO-3 with CPU offload and all weights"),
]
TOLERANCE = 1e-4


@pytest.mark.parametrize(("method", "strategy"), PAIRS)
def test_a_job_on_two_nodes_publishes_what_a_local_run_publishes(
    shop: Workshop, tmp_path: Path, method: str, strategy: str
) -> None:
    manifest = shop.manifest("job", method, strategy)
    shop.submit(manifest)
    status = shop.wait("job", "Complete")

    nodes = sorted(pod["spec"]["nodeName"] for pod in shop.pods("job"))
    assert nodes == ["n1", "n2"], "one pod on each node"
    conditions = {entry["type"]: entry["status"] for entry in status["conditions"]}
    assert conditions["ArtifactsPublished"] == conditions["Complete"] == "True"
    assert [attempt["resumedFromStep"] for attempt in status["attempts"]] == [0]

    artifact = shop.fetch(status, tmp_path / "artifact")
    local = shop.run_locally(manifest, tmp_path / "state")
    difference = largest_difference(shop.losses(status), shop.losses({"artifacts": local["artifacts"]}))
    assert difference <= TOLERANCE, f"largest difference of a step's loss: {difference:.2e}"
    _loads(artifact, method, tmp_path)


def _loads(artifact: Path, method: str, folder: Path) -> None:
    """The artifact is what plain transformers and plain PEFT read."""
    from peft import PeftModel
    from tests.builders import build_model
    from transformers import AutoModelForCausalLM

    if method == "Full":
        model: Any = AutoModelForCausalLM.from_pretrained(artifact)
    else:
        build_model(folder / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, str(artifact))
        changed = [name for name, value in model.named_parameters() if "lora_B" in name and value.abs().max() > 0]
        assert changed, "training moved the adapter away from zero"
    logits = model(input_ids=torch.arange(16).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()


def test_a_suspended_job_frees_its_pods_and_continues_to_the_same_adapter(shop: Workshop, tmp_path: Path) -> None:
    undisturbed, suspended = (shop.manifest(name, "LoRA", "DDP", **shop.slow(200)) for name in ("calm", "paused"))
    shop.submit(suspended)
    shop.wait_step("paused", 20)
    shop.patch("paused", {"runPolicy": {"suspend": True}})
    status = shop.wait("paused", "Suspended", seconds=60)
    assert [pod["metadata"]["name"] for pod in shop.pods("paused") if pod["status"]["phase"] == "Running"] == []
    assert 20 <= status["checkpoint"]["step"] <= status["attempts"][-1]["lastStep"] < 200

    shop.submit(undisturbed)
    calm = shop.wait("calm", "Complete")
    shop.patch("paused", {"runPolicy": {"suspend": False}})
    status = shop.wait("paused", "Complete")
    stopped_at = status["attempts"][0]["lastStep"]
    assert [attempt["resumedFromStep"] for attempt in status["attempts"]] == [0, stopped_at], "not a step was lost"
    assert status["attempts"][0]["cause"] == "Suspended"
    adapters = [shop.fetch(status, tmp_path / name) for status, name in ((status, "paused"), (calm, "calm"))]
    weights = [(adapter / "adapter_model.safetensors").read_bytes() for adapter in adapters]
    assert weights[0] == weights[1]
