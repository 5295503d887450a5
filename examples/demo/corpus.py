"""Real text that every machine with Python has: the documentation and sources of the installed standard library.

Modules are read as source, never imported, so nothing runs and the result depends on the Python version only.
`build` writes what the two jobs of the demo need:

    corpus.jsonl            {"text": ...}      documentation and sources, for pre-training
    questions-train.jsonl   {"messages": ...}  "What does textwrap.fill do?" with the first sentence of its docstring
    questions-held-out.jsonl                   the same for functions that no training question names
    base/                   config.json and a byte-pair tokenizer trained on the corpus
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "encodings"}
SHOWN = ("json.dumps", "shutil.copytree", "textwrap.dedent", "os.makedirs", "statistics.median")  # held out
DOCUMENT_CHARACTERS = 1400
INTRODUCTION_CHARACTERS = 400
VOCABULARY = 4096
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Answer:\n"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}Question: {{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Answer:\n{% endif %}"
)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@dataclass(frozen=True)
class Definition:
    """A documented function, method or class of a public module."""

    name: str  # "json.dumps"
    kind: str  # "function" | "class"
    signature: str  # "json.dumps(obj, *, skipkeys=False)"
    documentation: str
    source: str

    @property
    def introduction(self) -> str:
        """The docstring's first paragraphs: what it is about comes first, long examples last."""
        paragraphs = self.documentation.split("\n\n")
        kept = paragraphs[:1]
        for paragraph in paragraphs[1:]:
            if sum(map(len, kept)) + len(paragraph) > INTRODUCTION_CHARACTERS:
                break
            kept.append(paragraph)
        return "\n\n".join(kept)

    @property
    def summary(self) -> str:
        """The first sentence of the docstring on one line."""
        paragraph = " ".join(self.documentation.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


@dataclass(frozen=True)
class DemoData:
    """What was built, in numbers."""

    documents: int
    characters: int
    questions: int
    held_out: int


def build(directory: Path, characters: int) -> DemoData:
    """Write corpus, questions, model configuration and tokenizer into ``directory``; the same bytes every time.

    ``characters`` bounds the corpus: all introductions, then sources in the order of their hash.
    """
    directory.mkdir(parents=True, exist_ok=True)
    definitions = list(standard_library())
    texts = corpus_texts(definitions, characters)
    train, held_out = questions(definitions)
    _write_lines(directory / "corpus.jsonl", ({"text": text} for text in texts))
    _write_lines(directory / "questions-train.jsonl", map(_conversation, train))
    _write_lines(directory / "questions-held-out.jsonl", map(_conversation, held_out))
    base = directory / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps(MODEL, indent=2) + "\n")
    train_tokenizer([*texts, *(question(one) for one in train)], base)
    return DemoData(len(texts), sum(map(len, texts)), len(train), len(held_out))


def standard_library() -> Iterator[Definition]:
    """Every documented public definition of the installed standard library, in the order of module and line."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if SKIPPED & set(parts) or any(part.startswith("_") or not part.isidentifier() for part in parts):
            continue
        source = path.read_text(encoding="utf-8")
        yield from _definitions(".".join(parts), ast.parse(source).body, source.splitlines())


def _definitions(prefix: str, body: list[ast.stmt], lines: list[str]) -> Iterator[Definition]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        documentation = ast.get_docstring(node)
        is_class = isinstance(node, ast.ClassDef)
        if documentation:
            signature = name if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            yield Definition(name, "class" if is_class else "function", signature, documentation, source)
        if is_class:
            yield from _definitions(name, node.body, lines)


def corpus_texts(definitions: list[Definition], characters: int) -> list[str]:
    """The introduction of every definition, then function sources until the corpus has about ``characters``."""
    pages = [f"{one.kind} {one.signature}\n\n{one.introduction}" for one in definitions]
    sources = sorted((one for one in definitions if one.kind == "function"), key=lambda one: _hash(one.name))
    texts = [part for page in pages for part in _parts(page)]
    size = sum(map(len, texts))
    for one in sources:
        if size >= characters:
            break
        for part in _parts(f"# {one.name}\n{one.source}"):
            texts.append(part)
            size += len(part)
    return sorted(dict.fromkeys(texts), key=_hash)


def _parts(text: str) -> Iterator[str]:
    """``text`` cut at line ends into documents of bounded length."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines():
        if lines and size + len(line) > DOCUMENT_CHARACTERS:
            yield "\n".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield "\n".join(lines)


def question(definition: Definition) -> str:
    return f"What is {definition.name}?" if definition.kind == "class" else f"What does {definition.name} do?"


def questions(definitions: list[Definition]) -> tuple[list[Definition], list[Definition]]:
    """(train, held out): one definition in eight is held out by the hash of its name, and no answer is in both."""
    asked = [one for one in {one.name: one for one in definitions}.values() if 12 <= len(one.summary) <= 160]
    held_out = [one for one in asked if one.name in SHOWN or _hash(one.name) < "2"]
    known = {one.name for one in held_out}
    answers = {one.summary for one in held_out}
    train = [one for one in asked if one.name not in known and one.summary not in answers]
    return sorted(train, key=lambda one: _hash(one.name)), sorted(held_out, key=lambda one: _hash(one.name))


def _conversation(definition: Definition) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": question(definition)},
            {"role": "assistant", "content": definition.summary},
        ]
    }


def train_tokenizer(texts: Iterable[str], directory: Path) -> None:
    """A byte-level byte-pair tokenizer with an end token and the chat template, saved as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = MODEL["max_position_embeddings"]
    fast.save_pretrained(directory)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_lines(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
