"""Jobs for one GPU without a launcher: synthetic tokens, random models of any shape, one rank in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import DatasetFacts, Facts
from finetune_api.planner import complete_plan, make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_trainer.data.dataset import write_index
from finetune_trainer.distributed import RankContext, join_process_group
from finetune_trainer.worker_config import WorkerConfig

_UNSUPERVISED = 3  # tokens of a segment without loss


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 131_072


TINY = Shape(64, 128, 2, 4, 2, 256, 16)
HEADS_64 = Shape(256, 512, 2, 4, 2, 1024, 64)
HEADS_128 = Shape(512, 1024, 2, 4, 2, 1024, 128)
LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128_256, 128)  # Llama 3 8B
LLAMA_3B = Shape(3072, 8192, 28, 24, 8, 128_256, 128, tie_word_embeddings=True)  # Llama 3.2 3B
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128_256, 64, tie_word_embeddings=True)  # Llama 3.2 1B


def write_model(directory: Path, shape: Shape, device: torch.device) -> Path:
    """config.json and bf16 safetensors, one file per layer, drawn on ``device``."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**asdict(shape), architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        weight = torch.ones(parameter.shape, device=device)
        if parameter.ndim > 1:
            weight.normal_(0.0, 0.02, generator=generator)
        files.setdefault(f"model-{part}.safetensors", {})[name] = weight.to(torch.bfloat16).cpu()
    for file, tensors in files.items():
        save_file(tensors, directory / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def write_data(directory: Path, rows: Sequence[Sequence[int]], vocabulary: int, validation_rows: int) -> Path:
    """A prepared directory whose rows hold segments of the given lengths: counting sequences, so they can be learnt."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lengths = np.asarray([length for row in rows for length in row], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    starts, strides = generator.integers(0, vocabulary, len(lengths)), generator.integers(1, 4, len(lengths))
    tokens = [
        (start + stride * np.arange(length)) % (vocabulary - 8)
        for start, stride, length in zip(starts, strides, lengths, strict=True)
    ]
    mask = np.ones(int(lengths.sum()), np.uint8)
    for start in offsets[:-1]:
        mask[start : start + _UNSUPERVISED] = 0
    np.concatenate(tokens).astype(np.int32).tofile(directory / "tokens.i32")
    mask.tofile(directory / "mask.u8")
    offsets.tofile(directory / "offsets.i64")
    np.add.reduceat(mask.astype(np.int64), offsets[:-1]).tofile(directory / "supervised.i64")
    np.zeros(len(lengths), np.int32).tofile(directory / "origin_file.i32")
    np.arange(len(lengths), dtype=np.int64).tofile(directory / "origin_line.i64")
    counts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    cut = len(rows) - validation_rows
    for name, first, last in (("train", 0, cut), ("validation", cut, len(rows))):
        np.arange(counts[first], counts[last], dtype=np.int64).tofile(directory / f"{name}.rows.i64")
        (counts[first : last + 1] - counts[first]).tofile(directory / f"{name}.offsets.i64")
    facts = DatasetFacts(
        files=1, bytes=1, train_samples=cut, validation_samples=validation_rows, exact=True, digest="0" * 64
    )
    record = facts.model_dump(mode="json", by_alias=True)
    index = {"files": ["synthetic.jsonl"], "facts": record, "counts": {"rows": len(rows), "chatTemplate": "none"}}
    write_index(directory, {**index, "validation": validation_rows > 0, "samples": []})
    return directory


def join(device: str) -> RankContext:
    """This process as the only rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29611")
    return join_process_group(device, 120)


def on(context: RankContext, device: str) -> RankContext:
    """The same rank computing on another device."""
    return replace(context, device=torch.device("cuda", 0) if device == "cuda" else torch.device("cpu"))


def worker_config(tag: str, model: Path, data: Path, work: Path, values: dict[str, Any]) -> WorkerConfig:
    """A rank's configuration for ``values`` (method, training, distributed, ...) on one device."""
    index = json.loads((data / "prepared.json").read_text())
    dataset = DatasetFacts.model_validate(index["facts"])
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": model.as_uri()},
            "dataset": {"train": [{"uri": "file:///synthetic.jsonl"}], "maxSequenceLength": 131_072},
            "output": {"uri": (work / "output").as_uri()},
            **values,
        }
    )
    job = JobIdentity(name=tag, uid=tag)
    facts = model_facts_from_config(json.loads((model / "config.json").read_text()), None)
    plan = make_plan(spec, Facts(model=facts, dataset=dataset), job)
    config = TrainerConfig(
        job=job,
        spec=spec,
        plan=complete_plan(plan, spec, dataset, facts),
        rendezvous=Rendezvous(endpoint="127.0.0.1:29612", minimum_nodes=1, maximum_nodes=1),
        work_directory=str(work / tag),
        cache_directory=str(work / "cache"),
    )
    (work / tag / "ranks").mkdir(parents=True, exist_ok=True)
    return WorkerConfig(
        trainer=config, model_directory=str(model), data_directory=str(data), log_directory=str(work / "logs")
    )
