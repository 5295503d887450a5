"""The demo's data: real text of this Python, deterministic, and honest about what is held out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHARACTERS = 150_000


def _load(name: str) -> ModuleType:
    """A module of examples/demo, which is no package."""
    path = ROOT / "examples" / "demo" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"demo_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


corpus = _load("corpus")


@pytest.fixture(scope="module")
def definitions() -> list[Any]:
    return list(corpus.standard_library())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    corpus.build(directory, CHARACTERS)
    return directory


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_definitions_are_those_of_the_installed_library(definitions: list[Any]) -> None:
    by_name = {one.name: one for one in definitions}
    assert len(definitions) > 3000
    assert by_name["json.dumps"].signature.startswith("json.dumps(obj, *, skipkeys=False, ensure_ascii=True")
    assert by_name["json.dumps"].documentation == (json.dumps.__doc__ or "").replace("\n    ", "\n").strip()
    assert by_name["json.dumps"].summary == "Serialize ``obj`` to a JSON formatted ``str``."
    assert [one.name for one in definitions if "._" in one.name] == []


def test_no_question_or_answer_of_the_validation_set_is_in_the_training_set(definitions: list[Any]) -> None:
    train, held_out = corpus.questions(definitions)
    assert len(train) > 2000
    assert 200 < len(held_out) < len(train) / 4
    assert {corpus.question(one) for one in train} & {corpus.question(one) for one in held_out} == set()
    assert {one.summary for one in train} & {one.summary for one in held_out} == set()


def test_every_question_that_the_demo_shows_is_held_out(definitions: list[Any]) -> None:
    _, held_out = corpus.questions(definitions)
    assert set(corpus.SHOWN) - {one.name for one in held_out} == set()


def test_the_same_python_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    corpus.build(tmp_path, CHARACTERS)

    def digests(directory: Path) -> dict[str, str]:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert digests(built) == digests(tmp_path)
    assert {"corpus.jsonl", "questions-train.jsonl", "questions-held-out.jsonl", "base/config.json"} <= set(
        digests(built)
    )


def test_the_corpus_holds_all_documentation_before_any_source(definitions: list[Any]) -> None:
    documentation = sum(len(one.documentation) for one in definitions)
    small = corpus.corpus_texts(definitions, documentation // 2)
    assert [text for text in small if text.startswith("# ") and "\ndef " in text] == []
    large = corpus.corpus_texts(definitions, documentation * 2)
    assert [text for text in large if text.startswith("# ") and "def " in text] != []
    longest_line = max(len(line) for text in large for line in text.splitlines())
    assert max(map(len, large)) <= corpus.DOCUMENT_CHARACTERS + longest_line


def test_an_answer_begins_at_a_token_of_its_own_and_ends_with_the_end_token(built: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built / "base")
    assert tokenizer.chat_template == corpus.CHAT_TEMPLATE
    for row in _rows(built / "questions-held-out.jsonl")[:50]:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert whole[: len(prompt)] == prompt
        answer = tokenizer.decode(whole[len(prompt) :])
        assert answer == f"{row['messages'][1]['content']}{corpus.END}\n"


def test_the_model_of_the_demo_is_one_that_transformers_builds(built: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(built / "base"))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 3_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 6_000_000
