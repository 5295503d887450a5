"""Which tokens carry loss: for templates with and without markers, for every format, for awkward templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.builders import CHATML, GENERATION, LLAMA3, MISTRAL, THINKING, build_tokenizer, conversation
from tests.unit.trainer.data.rig import Workbench

from finetune_api.errors import DataError
from finetune_api.spec import DataFormat, LossOn
from finetune_trainer.data.formats import Record
from finetune_trainer.data.tokenizing import Encoded, RecordEncoder, check_tokenizer

LLAMA3_TOKENS = {"eos": "<|eot_id|>", "bos": "<|begin_of_text|>", "add_bos": True}
MISTRAL_TOKENS = {"eos": "</s>", "bos": "<s>", "add_bos": True}
TEMPLATES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "chatml": (CHATML, {}),
    "llama3": (LLAMA3, LLAMA3_TOKENS),
    "mistral": (MISTRAL, MISTRAL_TOKENS),
    "generation": (GENERATION, {}),
    "default": (None, {}),
}


def encode(bench: Workbench, row: dict[str, Any], loss_on: LossOn = LossOn.COMPLETION) -> Encoded:
    encoder = bench.encoder(DataFormat.MESSAGES, loss_on)
    record = Record(messages=row["messages"], tools=row.get("tools", []))
    return encoder.encode([encoder.render(record, "train.jsonl:1")])[0]


def learned(bench: Workbench, encoded: Encoded) -> list[str]:
    """Text of every run of tokens that carry loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.mask, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return [bench.tokenizer().decode(encoded.ids[a:b].tolist()) for a, b in runs]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["  the answer \n<|im_end|>", "été<|im_end|>"]),
        ("llama3", ["the answer<|eot_id|>", "été<|eot_id|>"]),
        ("mistral", ["   the answer \n</s>", " été</s>"]),
        ("generation", ["  the answer \n<|im_end|>", "été<|im_end|>"]),
        ("default", ["  the answer \n<|im_end|>", "été<|im_end|>"]),
    ],
)
def test_only_what_assistants_wrote_and_their_end_tokens_carry_loss(
    tmp_path: Path, name: str, expected: list[str]
) -> None:
    template, tokens = TEMPLATES[name]
    bench = Workbench(tmp_path, template, **tokens)
    row = conversation("hello", "  the answer \n", "the answer", "été")
    encoded = encode(bench, row)
    assert learned(bench, encoded) == expected
    assert encoded.ids.tolist() == bench.tokenizer().apply_chat_template(row["messages"], return_dict=False)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_loss_on_all_masks_nothing_but_the_first_token(tmp_path: Path, name: str) -> None:
    template, tokens = TEMPLATES[name]
    encoded = encode(Workbench(tmp_path, template, **tokens), conversation("hello", "world"), LossOn.ALL)
    assert encoded.mask.tolist() == [0] + [1] * (len(encoded.ids) - 1)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_any_text_of_an_assistant_is_learned_as_it_stands(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    template, tokens = TEMPLATES[name]
    bench = Workbench(tmp_path_factory.mktemp(name), template, **tokens)
    encoder = bench.encoder(DataFormat.MESSAGES, LossOn.COMPLETION)
    tokenizer = bench.tokenizer()
    end = tokens.get("eos", "<|im_end|>")
    plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|\ue000"), min_size=1, max_size=30)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(plain.filter(str.strip), min_size=2, max_size=6))
    def check(turns: list[str]) -> None:
        turns = turns[: len(turns) // 2 * 2]
        messages = conversation(*turns)["messages"]
        text, spans = encoder.render(Record(messages=messages), "f:1")
        answers = [turn.strip() if name == "llama3" else turn for turn in turns[1::2]]
        lead = " " if name == "mistral" else ""
        assert [text[a:b] for a, b in spans] == [lead + answer + end for answer in answers]
        encoded = encoder.encode([(text, spans)])[0]
        assert tokenizer.decode(encoded.ids.tolist()) == text
        if not encoded.straddling:
            taught = tokenizer.decode(encoded.ids[encoded.mask != 0].tolist())
            assert taught == "".join(lead + answer + end for answer in answers)

    check()


def test_a_template_that_drops_earlier_thinking_is_masked_exactly(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, THINKING)
    row = conversation("hello", "<think>hm</think>\n\nworld", "more", "<think>so</think>\nanswer ")
    assert learned(bench, encode(bench, row)) == ["world<|im_end|>", "<think>so</think>\nanswer<|im_end|>"]


def test_a_header_is_not_learned_from_a_template_without_generation_prompt(tmp_path: Path) -> None:
    template = CHATML.split("{% if add_generation_prompt %}")[0]
    bench = Workbench(tmp_path, template)
    row = conversation("hello", "world", "and", " you")
    assert learned(bench, encode(bench, row)) == ["world<|im_end|>", " you<|im_end|>"]


def test_what_a_template_puts_before_the_content_is_learned_when_the_prompt_does_not_give_it(tmp_path: Path) -> None:
    template = CHATML.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message.content }}",
    )
    bench = Workbench(tmp_path, template)
    assert learned(bench, encode(bench, conversation("hello", "world"))) == ["<think>\n\n</think>\n\nworld<|im_end|>"]


def test_an_end_token_is_appended_where_the_template_writes_none(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ '[' + message.role + ']\n' + message.content + '\n' }}{% endfor %}"
    bench = Workbench(tmp_path, template)
    assert learned(bench, encode(bench, conversation("hello", "world"))) == ["world\n<|im_end|>"]


def test_white_space_after_the_end_token_belongs_to_the_template(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    bench = Workbench(tmp_path, template)
    row = conversation("hello", "world", "and", "you")
    assert learned(bench, encode(bench, row)) == ["world<|im_end|>", "you<|im_end|>"]


def test_an_end_token_outside_the_markers_is_learned_too(tmp_path: Path) -> None:
    template = GENERATION.replace("<|im_end|>{% endgeneration %}\n", "{% endgeneration %}{{ '<|im_end|>\n' }}")
    bench = Workbench(tmp_path, template)
    row = conversation("hello", "world", "and", "you")
    assert learned(bench, encode(bench, row)) == ["world<|im_end|>", "you<|im_end|>"]


def test_system_and_tool_messages_are_prompt(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    messages = [
        {"role": "system", "content": "the model"},
        {"role": "user", "content": "index"},
        {"role": "assistant", "content": "import module"},
        {"role": "tool", "content": "value"},
        {"role": "assistant", "content": "the value"},
    ]
    assert learned(bench, encode(bench, {"messages": messages})) == ["import module<|im_end|>", "the value<|im_end|>"]


def test_tools_and_tool_calls_reach_the_template(tmp_path: Path) -> None:
    template = (
        "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
        "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    bench = Workbench(tmp_path, template)
    messages = [
        {"role": "user", "content": "index"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": {}}}]},
        {"role": "tool", "content": "value"},
        {"role": "assistant", "content": "the value"},
    ]
    encoded = encode(bench, {"messages": messages, "tools": [{"name": "search"}]})
    assert learned(bench, encoded) == ["<call>search<|im_end|>", "the value<|im_end|>"]
    assert '[{"name": "search"}]' in bench.tokenizer().decode(encoded.ids.tolist())


def test_a_template_whose_masks_cannot_be_proven_is_refused(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content if loop.last else message.content | upper }}<|im_end|>\n{% endfor %}"
    )
    bench = Workbench(tmp_path, template)
    with pytest.raises(DataError) as caught:
        encode(bench, conversation("hello", "world", "and", "you"))
    assert str(caught.value) == (
        "train.jsonl:1: the chat template rewrites messages[1] so that its place in the text cannot be proven; "
        "use a chat template with {% generation %} markers, or lossOn: All"
    )


def test_a_template_that_cannot_be_masked_still_serves_loss_on_all(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content if loop.last else message.content | upper }}<|im_end|>\n{% endfor %}"
    )
    bench = Workbench(tmp_path, template)
    encoded = encode(bench, conversation("hello", "world", "and", "you"), LossOn.ALL)
    assert encoded.mask.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, MISTRAL, **MISTRAL_TOKENS)
    with pytest.raises(DataError) as caught:
        encode(bench, conversation("hello", "world", system="the model"))
    assert str(caught.value) == (
        "train.jsonl:1: the chat template refuses the row (Only user and assistant roles are supported!); "
        "correct the row"
    )


def test_the_completion_and_its_end_token_carry_loss(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, None)
    encoder = bench.encoder(DataFormat.PROMPT_COMPLETION, LossOn.COMPLETION)
    record = Record(prompt="question: hello\n", completion="world")
    encoded = encoder.encode([encoder.render(record, "f:1")])[0]
    assert learned(bench, encoded) == ["world<|im_end|>"]
    assert bench.tokenizer().decode(encoded.ids[: encoded.prompt_tokens].tolist()) == "question: hello\n"


def test_a_token_over_the_start_of_a_completion_carries_no_loss(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, None)
    encoder = bench.encoder(DataFormat.PROMPT_COMPLETION, LossOn.COMPLETION)
    record = Record(prompt="hello wo", completion="rld and you")
    encoded = encoder.encode([encoder.render(record, "f:1")])[0]
    assert bench.tokenizer().convert_ids_to_tokens(encoded.ids.tolist())[:2] == ["hello", "Ġworld"]
    assert learned(bench, encoded) == [" and you<|im_end|>"]
    assert encoded.straddling


def test_every_token_of_a_text_but_the_first_carries_loss_and_an_end_token_is_added(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, None)
    encoder = bench.encoder(DataFormat.TEXT, LossOn.COMPLETION)
    encoded = encoder.encode([encoder.render(Record(text="hello world"), "f:1")])[0]
    assert bench.tokenizer().convert_ids_to_tokens(encoded.ids.tolist()) == ["hello", "Ġworld", "<|im_end|>"]
    assert encoded.mask.tolist() == [0, 1, 1]


@pytest.mark.parametrize("text", ["hello", "<s>hello", "hello</s>", "<s>hello</s>"])
def test_begin_and_end_tokens_are_never_doubled(tmp_path: Path, text: str) -> None:
    bench = Workbench(tmp_path, MISTRAL, **MISTRAL_TOKENS)
    encoder = bench.encoder(DataFormat.TEXT, LossOn.ALL)
    encoded = encoder.encode([encoder.render(Record(text=text), "f:1")])[0]
    assert bench.tokenizer().convert_ids_to_tokens(encoded.ids.tolist()) == ["<s>", "hello", "</s>"]
    turns = encode(bench, conversation("hello", "world")).ids.tolist()
    assert turns.count(bench.tokenizer().bos_token_id) == 1


def test_a_pad_token_equal_to_the_end_token_does_not_mask_it(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, CHATML, pad="<|im_end|>")
    tokenizer = bench.tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode(bench, conversation("hello", "world"))
    assert encoded.ids[encoded.mask != 0].tolist()[-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_leaves_white_space_out_of_its_offsets_is_masked_alike(tmp_path: Path) -> None:
    from tokenizers import processors

    bench = Workbench(tmp_path, MISTRAL, **MISTRAL_TOKENS)
    row = conversation("hello", "the answer", "hello world", " the module")
    tokenizer = bench.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer.backend_tokenizer.encode("hello hello", add_special_tokens=False).offsets[1] == (6, 11)
    facts = check_tokenizer(bench.tokenizer(), bench.model)
    encoder = RecordEncoder(tokenizer, facts, DataFormat.MESSAGES, LossOn.COMPLETION)
    encoded = encoder.encode([encoder.render(Record(messages=row["messages"]), "f:1")])[0]
    assert encoded.mask.tolist() == encode(bench, row).mask.tolist()


def test_the_prompt_of_a_sample_ends_where_the_last_answer_begins(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    row = conversation("hello", "world", "and", "you")
    for loss_on in LossOn:
        encoded = encode(bench, row, loss_on)
        prompt = bench.tokenizer().apply_chat_template(
            row["messages"][:3], add_generation_prompt=True, return_dict=False
        )
        assert encoded.ids[: encoded.prompt_tokens].tolist() == prompt


def test_builders_make_the_same_tokenizer_every_time(tmp_path: Path) -> None:
    build_tokenizer(tmp_path / "a", CHATML)
    build_tokenizer(tmp_path / "b", CHATML)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
