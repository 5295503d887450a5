"""Input and output embeddings that are one tensor in the base may be trained apart; what is published says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.jobs import ENGINES, Ground, Job, plain_base, validation_loss, with_adapter
from tests.training.sharing import shared_folder

pytestmark = pytest.mark.multiprocess

TRAINED: dict[str, dict[str, Any]] = {
    "adapted head": {"targetModules": ["q_proj", "lm_head"]},
    "adapted embeddings": {"targetModules": ["q_proj", "embed_tokens"]},
    "adapted both": {"targetModules": ["embed_tokens", "lm_head"]},
    "saved head": {"targetModules": ["q_proj"], "modulesToSave": ["lm_head"]},
    "saved embeddings": {"targetModules": ["q_proj"], "modulesToSave": ["embed_tokens"]},
    "saved both": {"targetModules": ["q_proj"], "modulesToSave": ["lm_head", "embed_tokens"]},
    "neither": {"targetModules": ["all-linear"]},
}
FORMATS = {"Adapter": "FSDP", "MergedModel": "DDP"}  # and the engine that trains it


def job(trained: str, output_format: str, engine: str, method: str = "LoRA") -> Job:
    settings: dict[str, dict[str, Any]] = {
        "training": {"maxSteps": 6, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-2},
        "dataset": {"validation": {"fraction": 0.2}},
        "output": {"format": output_format},
    }
    lora = {"rank": 4, **TRAINED[trained]}
    return Job(
        f"{trained} {method} {output_format} {engine}", {"type": method, "lora": lora}, ENGINES[engine], settings
    )


JOBS = [job(trained, form, engine) for trained in TRAINED for form, engine in FORMATS.items()]
JOBS += [job("saved head", form, "ZeRO-3") for form in FORMATS]
JOBS += [job("adapted head", "MergedModel", "FSDP", "QLoRA"), job("saved both", "MergedModel", "ZeRO-3", "QLoRA")]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    def run(folder: Path) -> None:
        Ground(folder, tie_word_embeddings=True).run(JOBS, 2)

    return Ground(shared_folder(tmp_path_factory, "tied", run))


@pytest.mark.parametrize("one", JOBS, ids=[one.tag for one in JOBS])
def test_the_loaded_artifact_gives_the_reported_validation_loss(ground: Ground, one: Job) -> None:
    from transformers import AutoModelForCausalLM

    outcome = ground.outcome(one)
    if one.settings["output"]["format"] == "Adapter":
        model = with_adapter(ground.model, one.method, outcome.artifact)
    else:
        model = AutoModelForCausalLM.from_pretrained(outcome.artifact, dtype=torch.float32).eval()
    rows = ground.data(one).validation
    assert rows is not None
    start, end = (evaluation["loss"] for evaluation in outcome.report["evaluations"])
    assert abs(validation_loss(plain_base(ground.model, one.method), rows) - start) <= 1e-4
    assert abs(validation_loss(model, rows) - end) <= 1e-4
    assert abs(end - start) > 0.01, "nothing was trained that could be lost"


def test_only_what_was_trained_apart_is_stored_apart(ground: Ground) -> None:
    assert "lm_head.weight" not in load_file(ground.model / "model.safetensors")
    for one in JOBS:
        if one.settings["output"]["format"] == "MergedModel":
            names = load_file(ground.outcome(one).artifact / "model.safetensors")
            assert ("lm_head.weight" in names) is not one.tag.startswith("neither"), one.tag
