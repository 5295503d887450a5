"""Facts come from listings and headers; the bytes that are read are counted on a real server's side by size alone."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_api.errors import DataError, ModelError
from finetune_api.spec import Dataset, DataSource, FineTuneJobSpec, Model
from finetune_storage.facts import list_source, read_dataset_facts, read_facts, read_model_facts

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}


def _dataset(*uris: str, **fields: Any) -> Dataset:
    return Dataset.model_validate({"train": [{"uri": uri, "format": "Text"} for uri in uris], **fields})


def _lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"row {number:08d} " + "x" * 40}).encode() + b"\n" for number in range(count))


def test_model_facts_come_from_config_and_listing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"0" * 1000)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"0" * 500)
    facts = read_model_facts(Model(uri=f"file://{tmp_path}"))
    assert facts is not None
    assert (facts.architecture, facts.layers, facts.weight_bytes) == ("LlamaForCausalLM", 2, 1500)


@pytest.mark.s3
def test_facts_are_read_from_a_bucket_with_the_jobs_own_settings(s3_server: Any, tmp_path: Path) -> None:
    from finetune_storage import ObjectStore

    environment = {key: value for key, value in s3_server.environment.items() if key != "AWS_ENDPOINT_URL"}
    place = f"s3://bucket/{tmp_path.name}"
    store = ObjectStore.open(place, environment=s3_server.environment)
    store.put("base/config.json", json.dumps(CONFIG).encode())
    store.put("data/train.jsonl", _lines(100))
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": f"{place}/base", "endpoint": s3_server.endpoint},
            "dataset": {
                "train": [{"uri": f"{place}/data/*.jsonl", "format": "Text", "endpoint": s3_server.endpoint}],
                "packing": False,
            },
            "method": {"type": "LoRA"},
            "output": {"uri": place},
        }
    )
    facts = read_facts(spec, environment=environment)
    assert facts.model is not None
    assert facts.dataset is not None
    assert facts.model.hidden_size == 64
    assert (facts.dataset.files, facts.dataset.bytes, facts.dataset.train_samples) == (1, len(_lines(100)), 100)
    assert not facts.dataset.exact


@pytest.mark.parametrize("rows", [1, 100, 50_000])
@pytest.mark.parametrize("compressed", [False, True])
def test_rows_of_jsonl_are_estimated_within_a_tenth(tmp_path: Path, rows: int, compressed: bool) -> None:
    file = tmp_path / ("train.jsonl.gz" if compressed else "train.jsonl")
    file.write_bytes(gzip.compress(_lines(rows)) if compressed else _lines(rows))
    facts = read_dataset_facts(_dataset(f"file://{file}", packing=False))
    assert facts.bytes == file.stat().st_size
    assert facts.train_samples == pytest.approx(rows, rel=0.1)


def test_rows_of_parquet_come_from_the_footer(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {number}" for number in range(1234)]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    facts = read_dataset_facts(_dataset(f"file://{tmp_path}/*.parquet", packing=False))
    assert facts.train_samples == 1234


def test_weights_and_the_validation_fraction_count(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(100))
    sources = [{"uri": f"file://{tmp_path}/a.jsonl", "weight": 3.0}]
    dataset = Dataset.model_validate({"train": sources, "packing": False, "validation": {"fraction": 0.1}})
    facts = read_dataset_facts(dataset)
    assert (facts.train_samples, facts.validation_samples) == (270, 30)


def test_packed_rows_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(100))
    assert read_dataset_facts(_dataset(f"file://{tmp_path}/a.jsonl")).train_samples is None


@pytest.mark.parametrize("name", ["damaged.parquet", "damaged.jsonl.gz", "unknown.jsonl.zst"])
def test_what_cannot_be_estimated_stays_unknown(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither of these" * 10)
    assert read_dataset_facts(_dataset(f"file://{tmp_path}/{name}", packing=False)).train_samples is None


def test_a_source_is_a_file_a_directory_or_a_glob(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "notes.txt", "deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}\n")

    def listed(rest: str) -> list[str]:
        return [file.uri for file in list_source(DataSource(uri=f"file://{tmp_path}{rest}"), "place")]

    assert listed("/a.jsonl") == [f"file://{tmp_path}/a.jsonl"]
    assert listed("/*.jsonl") == listed("") == listed("/") == [f"file://{tmp_path}/{n}.jsonl" for n in "ab"]
    assert listed("/*/*.jsonl") == [f"file://{tmp_path}/deep/c.jsonl"]
    with pytest.raises(DataError) as caught:
        listed("/x*.jsonl")
    assert str(caught.value) == (
        f"place.uri: no file is behind file://{tmp_path}/x*.jsonl; correct the URI or upload the data."
    )


def test_a_model_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_model_facts(Model(uri=f"file://{tmp_path}"))
    assert str(caught.value) == (
        f"The base model file://{tmp_path} has no config.json; point spec.model.uri at the directory that has it."
    )


def test_importing_the_room_is_light() -> None:
    heavy = {"torch", "pyarrow", "transformers", "huggingface_hub", "numpy"}
    code = f"import sys, finetune_storage.facts; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
