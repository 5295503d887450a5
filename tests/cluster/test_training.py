"""Jobs on two real nodes: every engine from `kubectl apply` to a verified adapter, the same numbers as a local run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.builders import build_model
from tests.cluster.workshop import METHODS, Workshop
from tests.training.jobs import largest_difference, validation_loss, with_adapter

from finetune_trainer.data import PreparedData

PAIRS = [
    pytest.param("LoRA", "DDP", id="DDP and LoRA"),
    pytest.param("QLoRA", "FSDP", id="FSDP and QLoRA"),
    pytest.param("LoRA", "ZeRO-2", id="ZeRO-2 and LoRA"),
    pytest.param("QLoRA", "ZeRO-3", id="ZeRO-3 and QLoRA"),
    pytest.param("Full", "ZeRO-3 offloaded", id="ZeRO-3 with CPU offload and all weights"),
]
TOLERANCE = 1e-4  # of losses
VALIDATION = {"validation": {"fraction": 0.2}}


@pytest.mark.parametrize(("method", "strategy"), PAIRS)
def test_a_job_on_two_nodes_publishes_what_a_local_run_publishes(
    shop: Workshop, tmp_path: Path, method: str, strategy: str
) -> None:
    manifest = shop.manifest("job", method, strategy, dataset=VALIDATION)
    shop.submit(manifest)
    status = shop.wait("job", "Complete")

    nodes = sorted(pod["spec"]["nodeName"] for pod in shop.pods("job"))
    assert nodes == ["n1", "n2"], "one pod on each node"
    conditions = {entry["type"]: entry["status"] for entry in status["conditions"]}
    assert conditions["ArtifactsPublished"] == conditions["Complete"] == "True"
    assert [attempt["resumedFromStep"] for attempt in status["attempts"]] == [0]

    artifact = shop.fetch(status, tmp_path / "artifact")
    local = shop.fetch(shop.run_locally(manifest, tmp_path / "state"), tmp_path / "local")
    trained_alike(report(artifact), report(local))
    weights_alike(tensors(artifact), tensors(local))

    loss = validation_loss(loaded(artifact, method, tmp_path / "base"), validation_rows(tmp_path / "state"))
    for where, told in (("in the cluster", report(artifact)), ("locally", report(local))):
        assert abs(loss - told["evaluations"][-1]["loss"]) <= TOLERANCE, f"the loss of what was trained {where}"


def report(artifact: Path) -> dict[str, Any]:
    return dict(json.loads((artifact / "report.json").read_text(encoding="utf-8")))


def trained_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same losses after every step and at every evaluation, and they fall."""
    difference = largest_difference(*([step["loss"] for step in told["steps"]] for told in (one, other)))
    assert difference <= TOLERANCE, f"largest difference of a step's loss: {difference:.2e}"
    steps = [[evaluation["step"] for evaluation in told["evaluations"]] for told in (one, other)]
    assert steps == [[0, 20], [0, 20]]
    losses = [[evaluation["loss"] for evaluation in told["evaluations"]] for told in (one, other)]
    difference = largest_difference(*losses)
    assert difference <= TOLERANCE, f"largest difference of a validation loss: {difference:.2e}"
    assert losses[0][1] < losses[0][0] - 0.05, "it learned nothing"


def tensors(artifact: Path) -> dict[str, torch.Tensor]:
    """All weights of an artifact."""
    found: dict[str, torch.Tensor] = {}
    for path in artifact.glob("*.safetensors"):
        found |= load_file(path)
    return found


def weights_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names, shapes and types, and nearly the same numbers."""
    shapes = [{name: (value.dtype, value.shape) for name, value in each.items()} for each in (one, other)]
    assert shapes[0] == shapes[1]
    assert one, "no weights at all"
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def loaded(artifact: Path, method: str, base: Path) -> Any:
    """What plain transformers or plain PEFT makes of an artifact: every tensor of it, and no other."""
    from peft import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    if method == "Full":
        model, told = AutoModelForCausalLM.from_pretrained(artifact, dtype="auto", output_loading_info=True)
        assert {name: found for name, found in told.items() if found} == {}, "keys that were missing or unexpected"
        return model.eval()
    build_model(base)
    model = with_adapter(base, METHODS[method], artifact)
    read, published = get_peft_model_state_dict(model), tensors(artifact)
    assert read.keys() == published.keys()
    assert all(torch.equal(read[name], value) for name, value in published.items())
    return model


def validation_rows(state: Path) -> Any:
    """The validation split as the local run prepared it."""
    (found,) = (state / "cache" / "data").glob("*/prepared.json")
    rows = PreparedData.open(found.parent).validation
    assert rows is not None
    return rows
