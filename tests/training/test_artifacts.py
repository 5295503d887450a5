"""What is published is what was trained: plain PEFT, transformers and bitsandbytes load it and agree."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tests.builders import CHATML
from tests.training.jobs import (
    ENGINES,
    METHODS,
    Ground,
    Job,
    Outcome,
    row_logits,
    run_together,
    validation_loss,
    with_adapter,
)
from tests.training.sharing import shared_folder

from finetune_storage import ObjectStore, fetch_artifact, file_digest
from finetune_trainer.worker_config import WorkerConfig

pytestmark = pytest.mark.multiprocess

TRAINING = {"maxSteps": 6, "globalBatchSize": 8, "precision": "FP32", "learningRate": 1e-2}
SAVED = {"type": "LoRA", "lora": {"rank": 4, "modulesToSave": ["lm_head", "embed_tokens"]}}
DORA = {"type": "LoRA", "lora": {"rank": 4, "useDora": True}}
SINGLE = {**METHODS["QLoRA"], "quantization": {"doubleQuantization": False}}
QUANTIZED = {  # tag of a job: its method
    "QLoRA FSDP": METHODS["QLoRA"],
    "QLoRA ZeRO-3": METHODS["QLoRA"],
    "QLoRA FSDP single": SINGLE,
    "QLoRA ZeRO-3 single": SINGLE,
}
MERGED = {"LoRA DDP": "LoRA merged", "QLoRA FSDP": "QLoRA merged", "DoRA": "DoRA merged", "saved": "saved merged"}


def job(tag: str, method: dict[str, Any], engine: str, output_format: str | None = None, **more: Any) -> Job:
    settings: dict[str, dict[str, Any]] = {"training": TRAINING, "dataset": {"validation": {"fraction": 0.2}}}
    if output_format is not None:
        settings["output"] = {"format": output_format}
    return Job(tag, method, ENGINES[engine], settings, **more)


JOBS = [
    job("LoRA DDP", METHODS["LoRA"], "DDP"),
    job("LoRA again", METHODS["LoRA"], "DDP", output="LoRA DDP"),
    job("LoRA merged", METHODS["LoRA"], "DDP", "MergedModel"),
    job("DoRA", DORA, "FSDP"),
    job("DoRA merged", DORA, "FSDP", "MergedModel"),
    job("saved", SAVED, "DDP"),
    job("saved merged", SAVED, "ZeRO-3", "MergedModel"),
    *(job(tag, method, tag.split()[1]) for tag, method in QUANTIZED.items()),
    job("QLoRA merged", METHODS["QLoRA"], "FSDP", "MergedModel"),
    job("Full", METHODS["Full"], "FSDP", "FullModel"),
]
REMOTE = {
    "remote full": ("Full", "FullModel"),
    "remote merged": ("LoRA", "MergedModel"),
    "remote adapter": ("LoRA", None),
}
TOOL_TEMPLATE = CHATML.replace("{% for", "<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% for", 1)
ARCHITECTURE = """
from transformers import LlamaForCausalLM
from .configuration_house import HouseConfig

class HouseForCausalLM(LlamaForCausalLM):
    config_class = HouseConfig
"""
CONFIGURATION = """
from transformers import LlamaConfig

class HouseConfig(LlamaConfig):
    model_type = "house"
"""
ADAPTERS = ["LoRA DDP", "DoRA", "saved", *QUANTIZED]


def grounds(folder: Path) -> tuple[Ground, Ground]:
    """One whose model has a template for tools, and one whose model brings its own code."""
    plain, remote = Ground(folder), Ground(folder / "remote", rows=24)
    (plain.model / "additional_chat_templates").mkdir(exist_ok=True)
    (plain.model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    (remote.model / "configuration_house.py").write_text(CONFIGURATION)
    (remote.model / "modeling_house.py").write_text(ARCHITECTURE)
    classes = {
        "AutoConfig": "configuration_house.HouseConfig",
        "AutoModelForCausalLM": "modeling_house.HouseForCausalLM",
    }
    config = json.loads((remote.model / "config.json").read_text())
    config |= {"model_type": "house", "architectures": ["HouseForCausalLM"], "auto_map": classes}
    (remote.model / "config.json").write_text(json.dumps(config))
    return plain, remote


def remote_job(ground: Ground, tag: str) -> Job:
    def allow(worker: WorkerConfig) -> WorkerConfig:
        trainer = worker.trainer.model_copy(update={"allow_remote_code": True})
        return worker.model_copy(update={"trainer": trainer})

    method, output_format = REMOTE[tag]
    one = job(tag, METHODS[method], "DDP", output_format, change=allow)
    one.settings["model"] = {"uri": f"file://{ground.model}", "trustRemoteCode": True}
    return one


def run_all(folder: Path) -> None:
    plain, remote = grounds(folder)
    run_together([*((plain, one) for one in JOBS), *((remote, remote_job(remote, tag)) for tag in REMOTE)], 2)


class Published:
    """All jobs of this file after they ran, and where their artifacts were fetched to."""

    def __init__(self, folder: Path, fetched: Path) -> None:
        self.ground, self.fetched = Ground(folder), fetched
        self.remote = Ground(folder / "remote")
        self.outcomes: dict[str, Outcome] = {one.tag: self.ground.outcome(one) for one in JOBS}
        rows = self.ground.data(JOBS[0]).validation
        assert rows is not None
        self.rows = rows

    def place(self, tag: str) -> ObjectStore:
        found = next(one for one in JOBS if one.tag == tag)
        config = self.ground.trainer_config(found, 2)
        location = config.spec.output.model_copy(update={"uri": config.plan.artifact_prefix})
        return ObjectStore.open_location(location)

    def fetch(self, tag: str) -> Path:
        target = self.fetched / tag.replace(" ", "-")
        if not target.exists():
            fetch_artifact(self.place(tag), target)
        return target

    def validation_loss(self, model: Any) -> float:
        return validation_loss(model, self.rows)

    def logits(self, model: Any) -> torch.Tensor:
        """(T, V) of one row."""
        return row_logits(model, self.rows, 0)

    def trainers_loss(self, tag: str) -> float:
        evaluations = self.outcomes[tag].report["evaluations"]
        assert [evaluation["step"] for evaluation in evaluations] == [0, 6]
        return float(evaluations[-1]["loss"])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = shared_folder(tmp_path_factory, "artifacts", run_all)
    return Published(folder, tmp_path_factory.mktemp("fetched"))


def published_adapter(published: Published, tag: str) -> Any:
    method = next(one.method for one in JOBS if one.tag == tag)
    return with_adapter(published.ground.model, method, published.fetch(tag))


def test_a_published_adapter_in_plain_peft_gives_the_trainers_validation_loss(published: Published) -> None:
    for tag in ADAPTERS:
        model = published_adapter(published, tag)
        wanted = published.trainers_loss(tag)
        assert abs(published.validation_loss(model) - wanted) <= 1e-4, tag
        with model.disable_adapter():
            base = published.outcomes[tag].report["evaluations"][0]["loss"]
            assert abs(published.validation_loss(model) - base) <= 1e-4, tag
        assert wanted < base - 0.05, f"{tag} learned nothing"


def test_a_merged_model_is_its_base_and_adapter_in_one(published: Published) -> None:
    from transformers import AutoModelForCausalLM

    for adapter, merged in MERGED.items():
        model = AutoModelForCausalLM.from_pretrained(published.fetch(merged), dtype="auto").eval()
        assert model.dtype is torch.float32
        expected = published.logits(published_adapter(published, adapter))
        torch.testing.assert_close(published.logits(model), expected, rtol=0, atol=1e-4, msg=merged)
        assert abs(published.validation_loss(model) - published.trainers_loss(merged)) <= 1e-4, merged


def test_a_model_merged_after_qlora_holds_the_4_bit_weights_it_was_trained_on(published: Published) -> None:
    from safetensors.torch import load_file

    base = load_file(published.ground.model / "model.safetensors")
    merged = load_file(published.fetch("QLoRA merged") / "model.safetensors")
    adapter = load_file(published.fetch("QLoRA FSDP") / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    frozen = merged[f"{name}.weight"] - 32.0 / 4 * b @ a
    levels = [block.div(block.abs().max()).sort().values.diff().gt(1e-3).sum() + 1 for block in frozen.reshape(-1, 64)]
    assert max(levels) <= 16
    assert float((frozen - base[f"{name}.weight"]).abs().max()) > 1e-4


def test_a_full_model_loads_in_plain_transformers_and_gives_the_trainers_loss(published: Published) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = published.fetch("Full")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    assert abs(published.validation_loss(model) - published.trainers_loss("Full")) <= 1e-4
    text = "explain what a python function returns"
    original, tokenizer = (AutoTokenizer.from_pretrained(place) for place in (published.ground.model, directory))
    assert tokenizer(text).input_ids == original(text).input_ids


@pytest.mark.parametrize("tag", QUANTIZED)
def test_a_rank_of_two_stores_half_of_the_4_bit_bytes(published: Published, tag: str) -> None:
    checks = published.outcomes[tag].report["selfCheck"]
    assert len(checks) == 2
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # numbers in the linear layers of two decoder layers
    statistics = weights // 64 * (4 if "single" in tag else 1)
    for check in checks:
        assert check["quantizedLayers"] == 14
        assert check["quantizedBytes"] == weights // 2 + statistics
        assert check["quantizedBytesHere"] <= 0.52 * check["quantizedBytes"]
    assert sum(check["quantizedBytesHere"] for check in checks) >= checks[0]["quantizedBytes"]


def test_publishing_the_same_job_again_leaves_one_artifact(published: Published) -> None:
    again = published.outcomes["LoRA again"]
    assert again.weights == published.outcomes["LoRA DDP"].weights
    names = {path.split("/")[1] for path in (info.path for info in published.place("LoRA DDP").list("artifacts/"))}
    assert len(names) == 1, names


def test_every_manifest_names_every_file_with_its_digest(published: Published) -> None:
    for one in JOBS:
        directory = published.fetch(one.tag)
        manifest = json.loads((directory / "manifest.json").read_text())
        listed = {entry["path"]: (entry["sha256"], entry["bytes"]) for entry in manifest["files"]}
        files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        present = {name: file_digest(path) for name, path in files.items() if name != "manifest.json"}
        assert listed == present, one.tag


def test_report_card_and_tokenizer_lie_beside_the_weights(published: Published) -> None:
    for one in JOBS:
        directory = published.fetch(one.tag)
        assert (directory / "report.html").read_text().lower().startswith("<!doctype html>"), one.tag
        assert json.loads((directory / "report.json").read_text())["metrics"].keys() >= {"validationLoss", "trainLoss"}
        lines = (directory / "README.md").read_text().split("---\n")
        assert lines[0] == "", one.tag
        matter = YAML(typ="safe").load(lines[1])
        is_adapter = (directory / "adapter_config.json").exists()
        assert matter["library_name"] == ("peft" if is_adapter else "transformers"), one.tag
        assert (directory / "tokenizer.json").read_bytes() == (published.ground.model / "tokenizer.json").read_bytes()


def test_an_artifacts_tokenizer_writes_a_conversation_with_tools_as_the_base_does(published: Published) -> None:
    from transformers import AutoTokenizer

    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
    messages = [{"role": "user", "content": "hello"}]
    places = [published.ground.model, *(published.fetch(one.tag) for one in JOBS)]
    texts = {AutoTokenizer.from_pretrained(at).apply_chat_template(messages, tools, tokenize=False) for at in places}
    assert len(texts) == 1
    assert "look_up" in texts.pop()


def test_a_model_with_its_own_code_is_published_with_it(published: Published) -> None:
    from transformers import AutoModelForCausalLM

    for tag in REMOTE:
        outcome = published.remote.outcome(remote_job(published.remote, tag))
        code = sorted(path.name for path in outcome.artifact.glob("*.py"))
        if tag == "remote adapter":
            assert code == [], "its base has it"
            continue
        assert code == ["configuration_house.py", "modeling_house.py"]
        model = AutoModelForCausalLM.from_pretrained(outcome.artifact, trust_remote_code=True).eval()
        assert type(model).__name__ == "HouseForCausalLM"
        rows = published.remote.data(remote_job(published.remote, tag)).validation
        assert rows is not None
        assert abs(validation_loss(model, rows) - outcome.report["evaluations"][-1]["loss"]) <= 1e-4, tag


def test_the_tags_of_this_file_are_different() -> None:
    assert all(one.tag != other.tag for one, other in itertools.combinations(JOBS, 2))
