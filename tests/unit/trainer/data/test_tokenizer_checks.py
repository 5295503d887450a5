"""The tokenizer against the model: every misfit is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.builders import CHATML, LLAMA3, build_model, build_tokenizer

from finetune_api.errors import ModelError
from finetune_api.spec import DataFormat
from finetune_trainer.data import check_tokenizer, load_tokenizer

MODEL = "s3://models/tiny"


def checked(directory: Path, *formats: DataFormat) -> Any:
    return check_tokenizer(load_tokenizer(directory, MODEL), directory, formats or tuple(DataFormat), MODEL)


def refusal(directory: Path, *formats: DataFormat) -> str:
    with pytest.raises(ModelError) as caught:
        checked(directory, *formats)
    return str(caught.value)


def write_config(directory: Path, name: str, **values: Any) -> None:
    path = directory / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | values))


def test_a_model_of_our_builder_fits_its_tokenizer(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, CHATML)
    build_model(tmp_path)
    facts = checked(tmp_path)
    assert (facts.end_of_text, facts.end_of_turn, facts.chat_template, facts.bos) == (2, 2, "tokenizer", "")


def test_a_tokenizer_without_a_chat_template_gets_the_default_one(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, None)
    assert checked(tmp_path).chat_template == "default"
    text = load_tokenizer(tmp_path).apply_chat_template(
        [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}],
        tokenize=False,
    )
    assert text == "### system\na\n### user\nb\n### assistant\nc<|im_end|>\n"


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"{MODEL}: no tokenizer can be loaded (")
    assert refusal(tmp_path).endswith("); put tokenizer.json beside config.json")


def test_no_end_token(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, CHATML)
    document = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del document["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(document))
    assert refusal(tmp_path) == (
        f"{MODEL}: the tokenizer has no eos_token, so the model could never learn to stop; "
        "add one to tokenizer_config.json"
    )


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    size = len(build_tokenizer(tmp_path, CHATML))
    write_config(tmp_path, "config.json", model_type="llama", vocab_size=size - 1)
    assert refusal(tmp_path) == (
        f"{MODEL}: the tokenizer has {size} tokens but the model has embeddings for {size - 1}; "
        "use the tokenizer that belongs to the model, or resize its embeddings"
    )
    write_config(tmp_path, "config.json", vocab_size=size)
    checked(tmp_path)


def test_generation_that_does_not_stop_where_turns_end(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, CHATML, eos="<|endoftext|>")
    write_config(tmp_path, "generation_config.json", eos_token_id=0)
    assert refusal(tmp_path, DataFormat.MESSAGES) == (
        f"{MODEL}: training ends turns with token 2 ('<|im_end|>') but generation stops at 0 ('<|endoftext|>'); "
        "add 2 to eos_token_id in generation_config.json"
    )
    checked(tmp_path, DataFormat.TEXT)  # texts end with <|endoftext|>
    write_config(tmp_path, "generation_config.json", eos_token_id=[0, 2])
    assert checked(tmp_path).end_of_turn == 2


def test_generation_that_does_not_stop_where_texts_end(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, LLAMA3, eos="<|endoftext|>", bos="<|begin_of_text|>")
    write_config(tmp_path, "generation_config.json", eos_token_id=[8])
    assert refusal(tmp_path, DataFormat.TEXT) == (
        f"{MODEL}: training ends texts with token 0 ('<|endoftext|>') but generation stops at 8 ('<|eot_id|>'); "
        "add 0 to eos_token_id in generation_config.json"
    )
    assert checked(tmp_path, DataFormat.MESSAGES).end_of_turn == 8


def test_the_end_token_of_config_json_counts_where_there_is_no_generation_config(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, CHATML)
    write_config(tmp_path, "config.json", model_type="llama", vocab_size=1000, eos_token_id=3)
    assert refusal(tmp_path).endswith(
        "but generation stops at 3 ('<s>'); add 2 to eos_token_id in generation_config.json"
    )


def test_damaged_generation_config(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, CHATML)
    (tmp_path / "generation_config.json").write_text("{")
    assert refusal(tmp_path) == "generation_config.json: not valid JSON; copy the file from the base model again"


def test_a_chat_template_that_is_no_template(tmp_path: Path) -> None:
    build_tokenizer(tmp_path, "{% for message in messages %}")
    message = refusal(tmp_path, DataFormat.MESSAGES)
    assert message.startswith(f"{MODEL}: the chat template refuses the row (")
    checked(tmp_path, DataFormat.TEXT)
