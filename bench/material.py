"""What every measurement runs on: a Llama-style model with random weights and instructions of realistic lengths.

The instructions are real text: "write this function" with its documentation, answered by its source, taken from the
installed standard library, so their lengths spread as such data does. Built once into ``.cache/bench``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "bench"
VOCABULARY = 32_000
MAXIMUM_LENGTH = 1024  # tokens; longer rows are left out, so that both sides train on the same ones
ROWS = 1500


@dataclass(frozen=True)
class Material:
    """Paths and figures of what was built."""

    model: str
    data: str  # 1,500 rows
    lengths: list[int]  # tokens of each row
    parameters: int
    rows: int
    median_length: int
    ninetieth_length: int
    longest: int
    wide_model: str  # for the memory of loading


def build() -> Material:
    """The material, from the cache where it is whole."""
    record = CACHE / f"material-{_version()}.json"
    if record.exists():
        return Material(**json.loads(record.read_text()))
    CACHE.mkdir(parents=True, exist_ok=True)
    rows = list(_instructions())
    model, data = CACHE / "model", CACHE / "train.jsonl"
    tokenizer = _tokenizer([text for row in rows for text in row.values()], model)
    lengths = [len(ids) + 1 for ids in tokenizer([row["prompt"] + row["completion"] for row in rows]).input_ids]
    kept = [(row, length) for row, length in zip(rows, lengths, strict=True) if length <= MAXIMUM_LENGTH][:ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row, _ in kept))
    parameters = _random_model(model, hidden=512, layers=5, intermediate=1408)
    wide = CACHE / "wide"
    tokenizer.save_pretrained(wide)
    _random_model(wide, hidden=1024, layers=28, intermediate=4096, dtype="bfloat16")
    sizes = sorted(length for _, length in kept)
    material = Material(
        model=str(model),
        data=str(data),
        lengths=[length for _, length in kept],
        parameters=parameters,
        rows=len(kept),
        median_length=sizes[len(sizes) // 2],
        ninetieth_length=sizes[len(sizes) * 9 // 10],
        longest=sizes[-1],
        wide_model=str(wide),
    )
    record.write_text(json.dumps(asdict(material)))
    return material


def representative(material: Material, rows: int) -> tuple[str, int]:
    """(file, tokens) with ``rows`` rows whose lengths are the quantiles of all: a short epoch for both sides."""
    order = sorted(range(material.rows), key=lambda row: (material.lengths[row], row))
    chosen = sorted(order[int((index + 0.5) * material.rows / rows)] for index in range(rows))
    lines = Path(material.data).read_text().splitlines(keepends=True)
    path = CACHE / f"train-{rows}.jsonl"
    path.write_text("".join(lines[row] for row in chosen))
    return str(path), sum(material.lengths[row] for row in chosen)


def _version() -> str:
    """Changes with this file, the demo's reader of the standard library and Python itself."""
    sources = [Path(__file__), REPOSITORY / "examples" / "demo" / "corpus.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + sys.version.encode()).hexdigest()[:12]


def _instructions() -> Iterator[dict[str, str]]:
    sys.path.insert(0, str(REPOSITORY / "examples" / "demo"))
    import corpus

    chosen = [one for one in corpus.standard_library() if one.kind == "function"]
    for one in sorted(chosen, key=lambda one: hashlib.sha256(one.name.encode()).hexdigest()):
        yield {
            "prompt": f"### Instruction\nWrite the function {one.name}. {one.documentation}\n\n### Response\n",
            "completion": textwrap.dedent(one.source),
        }


def _tokenizer(texts: list[str], directory: Path) -> Any:
    """A byte-level byte-pair tokenizer; what the text does not fill of the vocabulary stays unused rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return fast


def _random_model(directory: Path, hidden: int, layers: int, intermediate: int, dtype: str = "float32") -> int:
    """Write a Llama with random weights in shards; its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="100MB")
    return sum(parameter.numel() for parameter in model.parameters())
