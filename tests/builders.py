"""Small real things for tests: a byte-level BPE tokenizer, chat templates, a tiny Llama, data files. Deterministic."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import zstandard

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Earlier thinking is dropped, the newest is kept; content is stripped.
THINKING = (
    "{% set last = namespace(user=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and loop.index0 < last.user and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|pad|>",
)
_TEXT = (
    "the answer is a list of words that the model reads and writes when the user asks what a function returns "
    "def return import class value number text none true false question explain python module string index error "
    "[INST] [/INST] system user assistant hello world good morning how are you today"
)
_WORDS = _TEXT.split()


def build_tokenizer(
    directory: Path,
    chat_template: str | None = None,
    *,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    pad: str | None = "<|pad|>",
    vocabulary_size: int = 512,
    add_bos: bool = False,
) -> Any:
    """Trains a byte-level BPE on fixed text and saves it into ``directory``; returns the transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [" ".join(_WORDS[i:] + _WORDS[:i]) + "\n" for i in range(len(_WORDS))]
    core.train_from_iterator(text, trainer)
    if add_bos:
        assert bos is not None
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
        )
    names = {"eos_token": eos, "bos_token": bos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=list(SPECIAL_TOKENS),
        **{name: token for name, token in names.items() if token is not None},
    )
    tokenizer.chat_template = chat_template
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer


def build_model(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """Writes config.json, generation_config.json and safetensors of a tiny random Llama; any config field may be given.

    The vocabulary and the end token are those of the tokenizer in ``directory``, built here when there is none.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (directory / "tokenizer.json").exists():
        build_tokenizer(directory, CHATML)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
    model.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One JSON document per line; ``.gz`` and ``.zst`` by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def conversation(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A Messages row: the turns alternate user, assistant, user, ..."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages}


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different single-turn conversations of different lengths."""
    import random

    source = random.Random(seed)
    rows = []
    for number in range(count):
        question = " ".join(source.choices(_WORDS, k=source.randint(2, 12)))
        answer = " ".join(source.choices(_WORDS, k=source.randint(1, 20)))
        rows.append(conversation(f"question {number}: {question}", answer))
    return rows


def texts(count: int, seed: int = 0, words: Sequence[int] = (5, 40)) -> list[dict[str, str]]:
    """Different Text rows of ``words[0]`` to ``words[1]`` words."""
    import random

    source = random.Random(seed)
    return [
        {"text": f"{number} " + " ".join(source.choices(_WORDS, k=source.randint(*words)))} for number in range(count)
    ]
