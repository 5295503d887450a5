"""A base model's files: in place, downloaded from a real S3 server, and refused with a sentence when unfit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.builders import build_model

from finetune_api.errors import ModelError
from finetune_api.plan import Facts, Plan
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_storage import ObjectStore
from finetune_trainer.model_files import describe_base_model, fetch_model, fingerprints


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def _config(uri: str, tmp_path: Path, allow_remote_code: bool = False, **model: Any) -> TrainerConfig:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": uri, **model},
            "dataset": {"train": [{"uri": "file:///data.jsonl", "format": "Messages"}]},
            "method": {"type": "LoRA"},
            "output": {"uri": "file:///out"},
        }
    )
    identity = JobIdentity(name="job", uid="u1")
    plan: Plan = make_plan(spec, Facts(), identity)
    return TrainerConfig(
        job=identity,
        spec=spec,
        plan=plan,
        rendezvous=Rendezvous(endpoint="127.0.0.1:1", minimum_nodes=1, maximum_nodes=1),
        work_directory=str(tmp_path / "work"),
        cache_directory=str(tmp_path / "cache"),
        allow_remote_code=allow_remote_code,
    )


def _refusal(config: TrainerConfig) -> str:
    with pytest.raises(ModelError) as caught:
        fetch_model(config)
    return str(caught.value)


def _contents(directory: Path) -> dict[Path, bytes]:
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def _split(model: Path) -> None:
    """Rewrite the model as two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, model / shard)
        weight_map |= dict.fromkeys(part, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()


def test_a_local_model_is_used_in_place(model: Path, tmp_path: Path) -> None:
    assert fetch_model(_config(f"file://{model}", tmp_path)) == model
    assert not (tmp_path / "cache").exists()


def test_a_sharded_model_is_accepted(model: Path, tmp_path: Path) -> None:
    _split(model)
    assert fetch_model(_config(f"file://{model}", tmp_path)) == model


@pytest.mark.s3
def test_a_model_in_a_bucket_is_downloaded_once(
    s3_server: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    _split(model)
    uri = f"s3://bucket/{tmp_path.name}/base"
    store = ObjectStore.open(uri)
    for file in model.iterdir():
        store.put(file.name, file)
    store.put("pytorch_model.bin", b"pickles are left where they are")
    store.put("optimizer/state.safetensors", b"not of the model")
    store.put("additional_chat_templates/tool_use.jinja", b"{{ tools }}")
    seen: list[tuple[str, float | None, float | None]] = []
    config = _config(uri, tmp_path)
    directory = fetch_model(config, lambda *progress: seen.append(progress))
    assert directory.parent == tmp_path / "cache" / "models"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert _contents(directory) == _contents(model)
    total = sum(len(content) for content in _contents(model).values())
    assert seen[0] == ("downloading model files (bytes)", 0, total)
    assert seen[-1] == ("downloading model files (bytes)", total, total)
    stamp = (directory / "config.json").stat().st_mtime_ns
    assert fetch_model(config) == directory
    assert (directory / "config.json").stat().st_mtime_ns == stamp
    (directory / "config.json").write_text("{")  # a damaged copy is fetched anew
    assert json.loads((fetch_model(config) / "config.json").read_text())["model_type"] == "llama"
    store.put("config.json", (model / "config.json").read_bytes() + b"\n")
    assert fetch_model(config) != directory


@pytest.mark.s3
def test_a_killed_download_goes_on_where_it_was(
    s3_server: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://bucket/{tmp_path.name}/base"
    store = ObjectStore.open(uri)
    for file in model.iterdir():
        store.put(file.name, file)
    config = _config(uri, tmp_path)
    directory = fetch_model(config)
    directory.rename(directory.with_name(directory.name + ".partial"))
    (directory.with_name(directory.name + ".partial") / "config.json").unlink()
    seen: list[tuple[str, float | None, float | None]] = []
    assert fetch_model(config, lambda *progress: seen.append(progress)) == directory
    total = sum(file.stat().st_size for file in model.iterdir())
    assert seen[0][1:] == (total - (model / "config.json").stat().st_size, total)


def test_random_initialisation_needs_no_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    assert fetch_model(_config(f"file://{model}", tmp_path, initialization="Random")) == model


def _drop_config(model: Path) -> None:
    (model / "config.json").unlink()


def _only_adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def _break_config(model: Path) -> None:
    (model / "config.json").write_text("[1]")


def _only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _drop_shard(model: Path) -> None:
    _split(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def _break_index(model: Path) -> None:
    _split(model)
    (model / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_config, "The base model {uri} has no config.json; point spec.model.uri at the directory that has it."),
        (_only_adapter, "{uri} holds an adapter, not a base model; merge it first or name its base model."),
        (_break_config, "config.json of the base model {uri} is not a JSON object; restore it."),
        (
            _only_pickles,
            "The base model {uri} has only pickled weights, which can run code when loaded; "
            "safetensors only: convert it with save_pretrained(safe_serialization=True).",
        ),
        (
            _no_weights,
            "The base model {uri} has no *.safetensors weights; add them, or set model.initialization: Random.",
        ),
        (
            _drop_shard,
            "The base model {uri} lacks the shard model-00002-of-00002.safetensors "
            "that model.safetensors.index.json names; upload it again.",
        ),
        (_break_index, "model.safetensors.index.json of the base model {uri} is not readable; upload it again."),
    ],
)
def test_an_unfit_model_is_refused_with_a_sentence(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(model)
    uri = f"file://{model}"
    assert _refusal(_config(uri, tmp_path)) == message.format(uri=uri)


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/absent"
    assert _refusal(_config(uri, tmp_path)) == f"The base model {uri} does not exist; correct spec.model.uri."


def test_a_truncated_weight_file_is_noticed(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    assert _refusal(_config(f"file://{model}", tmp_path)) == (
        f"model.safetensors of the base model file://{model} is damaged: "
        f"it has {size - 5} bytes instead of {size}; upload it again."
    )


@pytest.mark.parametrize("after", [b"", b'"dtype":"', b'"shape":[', b'"data_offsets":[', b'"data_offsets"'])
def test_an_altered_header_is_noticed(model: Path, tmp_path: Path, after: bytes) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[content.index(after) + len(after)] ^= 0x01
    (model / "model.safetensors").write_bytes(bytes(content))
    start = f"model.safetensors of the base model file://{model} is damaged: "
    assert _refusal(_config(f"file://{model}", tmp_path)).startswith(start)


@pytest.mark.parametrize(
    ("trusted", "allowed", "needed"),
    [
        (False, False, "set spec.model.trustRemoteCode if you trust it (the administrator must allow it too)"),
        (False, True, "set spec.model.trustRemoteCode if you trust it (the administrator must allow it too)"),
        (True, False, "the administrator must allow remote code"),
        (True, True, None),
    ],
)
def test_remote_code_needs_both_consents(
    model: Path, tmp_path: Path, trusted: bool, allowed: bool, needed: str | None
) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "auto_map": {"AutoConfig": "code.Config"}}))
    config = _config(f"file://{model}", tmp_path, allow_remote_code=allowed, trustRemoteCode=trusted)
    if needed is None:
        assert fetch_model(config) == model
        return
    assert _refusal(config) == (
        f"The base model file://{model} brings its own Python code (auto_map in config.json); {needed}, "
        "or remove auto_map where transformers knows the architecture."
    )


def test_a_hub_model_that_is_not_cached_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert _refusal(_config("hf://org/name@" + "0" * 40, tmp_path)) == (
        f"hf://org/name@{'0' * 40} is not in the local cache and HF_HUB_OFFLINE is set; unset it or fill HF_HOME."
    )


def test_a_base_model_is_described_with_its_licence(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    described = describe_base_model(_config(f"file://{model}", tmp_path, revision="0" * 40), model)
    assert described.pop("configSha256")
    assert described == {
        "uri": f"file://{model}",
        "initialization": "Pretrained",
        "revision": "0" * 40,
        "licence": "apache-2.0",
    }


@pytest.mark.parametrize("readme", ["# no front matter", "---\nlicense: [", "---\n: :\n---\n", "---\nlicense:\n---\n"])
def test_an_unstated_licence_is_left_out(model: Path, tmp_path: Path, readme: str) -> None:
    (model / "README.md").write_text(readme)
    assert "licence" not in describe_base_model(_config(f"file://{model}", tmp_path), model)


def test_the_fingerprint_is_of_what_is_trained_from_and_of_its_content_alone(model: Path, tmp_path: Path) -> None:
    config = _config(f"file://{model}", tmp_path)
    (model / "README.md").write_text("a document")
    (model / "optimizer.pt").write_text("not ours")
    (model / "consolidated.safetensors").write_text("the weights once more")
    tool_template = "additional_chat_templates/tool_use.jinja"
    (model / tool_template).parent.mkdir()
    (model / tool_template).write_text("{{ tools }}")
    before = fingerprints(config, model)
    assert {"config.json", "tokenizer.json", "model.safetensors", tool_template} <= before.keys()
    assert not {"README.md", "optimizer.pt", "consolidated.safetensors"} & before.keys()
    assert fingerprints(config, shutil.copytree(model, tmp_path / "copy")) == before
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert {name for name, digest in fingerprints(config, model).items() if digest != before[name]} == {
        "model.safetensors"
    }


@pytest.mark.parametrize("share", [0.0, 0.31, 0.74, 1.0])
def test_large_weights_are_sampled_from_their_first_byte_to_their_last(
    model: Path, tmp_path: Path, share: float
) -> None:
    config, weights = _config(f"file://{model}", tmp_path), model / "model.safetensors"
    size = 40_000_001
    weights.write_bytes(bytes(size))
    before = fingerprints(config, model)["model.safetensors"]
    start = int((size - 1_000_000) * share)  # another tensor of a megabyte
    with weights.open("r+b") as content:
        content.seek(start)
        content.write(b"\1" * 1_000_000)
    changed = fingerprints(config, model)["model.safetensors"]
    weights.write_bytes(bytes(size + 1))
    assert len({before, changed, fingerprints(config, model)["model.safetensors"]}) == 3
