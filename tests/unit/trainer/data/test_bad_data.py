"""Broken data sets: each gives exactly one sentence naming place, value and remedy, before anything is written."""

# ruff: noqa: E501 - messages stand whole, so that they can be searched for

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from tests.builders import conversation, conversations, texts, write_jsonl
from tests.unit.trainer.data.rig import Workbench

from finetune_api.errors import DataError

GOOD = conversation("hello", "world")


@dataclass(frozen=True)
class Broken:
    """One broken data set and what the user reads. ``{uri}`` stands for the directory of the data."""

    what: str
    write: Callable[[Path], Any]
    message: str
    train: str = "train.jsonl"
    dataset: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


def lines(*rows: Any) -> Callable[[Path], Any]:
    return lambda home: write_jsonl(home / "train.jsonl", rows)


def raw(content: bytes, name: str = "train.jsonl") -> Callable[[Path], Any]:
    return lambda home: (home / name).write_bytes(content)


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}, fields]}


def one_bad_line_among_10_000(home: Path) -> None:
    rows = [json.dumps(row) for row in texts(10_000)]
    rows[7_776] = rows[7_776][:-1]
    (home / "train.jsonl").write_text("\n".join(rows) + "\n")


def cut(content: bytes, name: str, keep: float = 0.6) -> Callable[[Path], Any]:
    return raw(content[: int(len(content) * keep)], name)


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def feather(columns: dict[str, list[Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.feather.write_feather(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


MANY = {"text": [row["text"] for row in texts(2000)]}

CASES = (
    Broken(
        "no such file",
        lambda home: None,
        "spec.dataset.train[0].uri: {uri}/train.jsonl does not exist; correct the path",
    ),
    Broken(
        "directory without data files",
        raw(b"hello", "readme.txt"),
        "spec.dataset.train[0].uri: {uri} matches readme.txt but no data file; give files that end in .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .feather, .csv",
        train="",
    ),
    Broken(
        "empty directory",
        lambda home: None,
        "spec.dataset.train[0].uri: {uri} matches no file; correct the path or the pattern",
        train="",
    ),
    Broken(
        "pattern without a match",
        lines(GOOD),
        "spec.dataset.train[0].uri: {uri}/*.parquet matches no file; correct the path or the pattern",
        train="*.parquet",
    ),
    Broken(
        "pattern that matches no data file",
        raw(b"hello", "readme.txt"),
        "spec.dataset.train[0].uri: {uri}/*.txt matches readme.txt but no data file; give files that end in .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .feather, .csv",
        train="*.txt",
    ),
    Broken(
        "file of an unknown kind",
        raw(b"hello", "train.xlsx"),
        "spec.dataset.train[0].uri: train.xlsx is not a known kind of data file; give files that end in .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .feather, .csv",
        train="train.xlsx",
    ),
    Broken("empty file", raw(b""), "train.jsonl: the file is empty; remove it from the source or fill it"),
    Broken(
        "only blank lines",
        raw(b"\n\n \n"),
        "spec.dataset.train[0]: no row in train.jsonl; add rows or remove the source",
    ),
    Broken(
        "one bad line among 10,000",
        one_bad_line_among_10_000,
        "train.jsonl:7777: not valid JSON (Expecting ',' delimiter at column 145); correct or remove the line",
    ),
    Broken(
        "JSON array instead of lines",
        raw(json.dumps([GOOD, GOOD]).encode()),
        "train.jsonl:1: a JSON array, not an object; write one object per line (jq -c '.[]' converts an array)",
    ),
    Broken(
        "JSON array over several lines",
        raw(json.dumps([GOOD], indent=1).encode()),
        "train.jsonl:1: a JSON document over several lines; write one object per line (jq -c '.[]' converts an array)",
    ),
    Broken(
        "line that is no object",
        lines(GOOD, "hello"),
        'train.jsonl:2: "hello" is not a JSON object; write one object per line',
    ),
    Broken(
        "NaN",
        raw(b'{"text": "hello", "score": 1}\n{"text": "hello", "score": NaN}\n'),
        "train.jsonl:2: NaN is not a JSON value; correct or remove the line",
    ),
    Broken(
        "Infinity",
        raw(b'{"text": "hello", "score": -Infinity}\n'),
        "train.jsonl:1: -Infinity is not a JSON value; correct or remove the line",
    ),
    Broken(
        "not UTF-8",
        raw(b'{"text": "hello"}\n{"text": "caf\xe9"}\n'),
        "train.jsonl:2: byte 0xe9 at offset 31 of the file is not UTF-8; save the file as UTF-8",
    ),
    Broken("UTF-16", raw('{"text": "hello"}'.encode("utf-16")), "train.jsonl: the file is UTF-16; save it as UTF-8"),
    Broken(
        "binary file",
        raw(bytes(range(256)) * 8),
        "train.jsonl:1: not valid JSON (Expecting value at column 1); correct or remove the line",
    ),
    Broken(
        "NUL bytes in a line",
        raw(b'{"text": "a\x00b"}\n'),
        "train.jsonl:1: not valid JSON (Invalid control character at column 12); correct or remove the line",
    ),
    Broken(
        "lone surrogate",
        raw(b'{"text": "\\ud83d"}\n'),
        "train.jsonl:1: the text holds a lone surrogate (U+D83D), which is not a character; remove it",
    ),
    Broken("deep nesting", raw(b"[" * 100_000), "train.jsonl:1: nested too deeply; correct or remove the line"),
    Broken(
        "truncated gzip",
        cut(gzip.compress(jsonl(texts(2000)), mtime=0), "train.jsonl.gz"),
        "train.jsonl.gz: the compressed file is damaged or cut off (Compressed file ended before the end-of-stream marker was reached); write it again",
        train="train.jsonl.gz",
    ),
    Broken(
        "gzip that is none",
        raw(jsonl(texts(3)), "train.jsonl.gz"),
        "train.jsonl.gz: the compressed file is damaged or cut off (Not a gzipped file (b'{\"')); write it again",
        train="train.jsonl.gz",
    ),
    Broken(
        "truncated Zstandard",
        cut(zstandard.compress(jsonl(texts(2000))), "train.jsonl.zst"),
        "train.jsonl.zst: the compressed file is damaged or cut off (the last frame is not complete); write it again",
        train="train.jsonl.zst",
    ),
    Broken(
        "corrupted Zstandard",
        raw(flipped(zstandard.ZstdCompressor(write_checksum=True).compress(jsonl(texts(2000)))), "train.jsonl.zst"),
        "train.jsonl.zst: the compressed file is damaged or cut off (zstd decompressor error: Restored data doesn't match checksum); write it again",
        train="train.jsonl.zst",
    ),
    Broken(
        "truncated Parquet",
        cut(parquet(MANY), "train.parquet"),
        "train.parquet: the file is damaged or not a parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file); write it again",
        train="train.parquet",
    ),
    Broken(
        "Parquet with a damaged page",
        raw(flipped(parquet(MANY)), "train.parquet"),
        "train.parquet: the file is damaged or not a parquet file (Corrupt snappy compressed data); write it again",
        train="train.parquet",
    ),
    Broken(
        "truncated Feather",
        cut(feather(MANY), "train.feather"),
        "train.feather: the file is damaged or not a feather file (Not an Arrow file); write it again",
        train="train.feather",
    ),
    Broken(
        "JSONL named Parquet",
        raw(jsonl(texts(3)), "train.parquet"),
        "train.parquet: the file is damaged or not a parquet file (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file); write it again",
        train="train.parquet",
    ),
    Broken(
        "Parquet without rows",
        raw(parquet({"text": pyarrow.array([], pyarrow.string())}), "train.parquet"),
        "spec.dataset.train[0]: no row in train.parquet; add rows or remove the source",
        train="train.parquet",
    ),
    Broken(
        "Parquet with numbers for text",
        raw(parquet({"text": [1.5, 2.5]}), "train.parquet"),
        "train.parquet:1: text must be a string, not 1.5; correct the value",
        train="train.parquet",
    ),
    Broken(
        "CSV with ragged rows",
        raw(b"prompt,completion\nhello,world\nhello,world,again\n", "train.csv"),
        "train.csv:3: 3 cells, but the header has 2 columns; quote cells that hold commas, or remove the row",
        train="train.csv",
    ),
    Broken(
        "CSV with an open quote",
        raw(b'text\n"hello\n', "train.csv"),
        "train.csv:2: not valid CSV (unexpected end of data); correct the quoting",
        train="train.csv",
    ),
    Broken(
        "CSV with a header alone",
        raw(b"text\n", "train.csv"),
        "spec.dataset.train[0]: no row in train.csv; add rows or remove the source",
        train="train.csv",
    ),
    Broken(
        "CSV with a column twice",
        raw(b"text,text\nhello,world\n", "train.csv"),
        "train.csv:1: the column text stands twice in the header; rename one",
        train="train.csv",
    ),
    Broken(
        "CSV whose messages are no JSON",
        raw(b"messages\nhello\n", "train.csv"),
        'train.csv:2: messages is text that is not JSON, "hello"; write a JSON list',
        train="train.csv",
    ),
    Broken(
        "unknown columns",
        lines({"question": "hello", "answer": "world"}),
        "train.jsonl: no format has the columns (question, answer): Messages needs messages; PromptCompletion needs prompt and completion; Text needs text; rename the columns",
    ),
    Broken(
        "no columns",
        lines({}),
        "train.jsonl: no format has the columns (none): Messages needs messages; PromptCompletion needs prompt and completion; Text needs text; rename the columns",
    ),
    Broken(
        "ambiguous columns",
        lines({**GOOD, "text": "hello"}),
        "train.jsonl: the columns (messages, text) fit Messages and Text; set spec.dataset.train[0].format to the one that is meant",
    ),
    Broken(
        "wrong format set",
        lines(GOOD),
        "train.jsonl:1: no column text, which Text needs (columns: messages); add it or set format",
        source={"format": "Text"},
    ),
    Broken(
        "prompt without completion",
        lines({"prompt": "hello"}),
        "train.jsonl: no format has the columns (prompt): Messages needs messages; PromptCompletion needs prompt and completion; Text needs text; rename the columns",
    ),
    Broken(
        "column absent in a later row",
        lines({"text": "hello"}, {"txt": "hello"}),
        "train.jsonl:2: no column text, which Text needs (columns: txt); add it or set format",
    ),
    Broken(
        "mixed schema",
        lines(GOOD, {"prompt": "hello", "completion": "world"}),
        "train.jsonl:2: no column messages, which Messages needs (columns: prompt, completion); add it or set format",
    ),
    Broken(
        "completion is null",
        lines({"prompt": "hello", "completion": None}),
        "train.jsonl:1: completion must be a string, not null; correct the value",
    ),
    Broken(
        "completion is empty",
        lines({"prompt": "hello", "completion": ""}),
        "train.jsonl:1: completion is empty; fill it or remove the row",
    ),
    Broken(
        "prompt is a list of messages",
        lines({"prompt": GOOD["messages"], "completion": "world"}),
        "train.jsonl:1: prompt is a list of messages; put them with the answer into one column messages",
    ),
    Broken(
        "prompt is an object",
        lines({"prompt": {"a": 1}, "completion": "world"}),
        'train.jsonl:1: prompt must be a string, not {"a": 1}; correct the value',
    ),
    Broken(
        "text is empty",
        lines({"text": "hello"}, {"text": ""}),
        "train.jsonl:2: text is empty; fill it or remove the row",
    ),
    Broken(
        "text is white space",
        lines({"text": " \n\t"}),
        "train.jsonl:1: text is only white space; fill it or remove the row",
    ),
    Broken("text is a number", lines({"text": 7}), "train.jsonl:1: text must be a string, not 7; correct the value"),
    Broken("text is null", lines({"text": None}), "train.jsonl:1: text must be a string, not null; correct the value"),
    Broken(
        "messages is an object",
        lines({"messages": {"role": "user"}}),
        'train.jsonl:1: messages must be a list of messages, not {"role": "user"}; correct the row',
    ),
    Broken(
        "messages is empty",
        lines({"messages": []}),
        "train.jsonl:1: messages is empty; add a user and an assistant message or remove the row",
    ),
    Broken(
        "messages is null",
        lines({"messages": None}),
        "train.jsonl:1: messages must be a list of messages, not null; correct the row",
    ),
    Broken(
        "a message is null",
        lines({"messages": [None]}),
        "train.jsonl:1: messages[0] must be an object with role and content, not null; correct the row",
    ),
    Broken(
        "a message is text",
        lines({"messages": ["hello"]}),
        'train.jsonl:1: messages[0] must be an object with role and content, not "hello"; correct the row',
    ),
    Broken(
        "role absent",
        lines(message(content="world")),
        "train.jsonl:1: messages[1].role is absent; use system, developer, user, assistant or tool",
    ),
    Broken(
        "role unknown",
        lines(message(role="bot", content="world")),
        'train.jsonl:1: messages[1].role is "bot"; use system, developer, user, assistant or tool',
    ),
    Broken(
        "role is a number",
        lines(message(role=1, content="world")),
        "train.jsonl:1: messages[1].role is 1; use system, developer, user, assistant or tool",
    ),
    Broken(
        "content absent",
        lines(message(role="assistant")),
        "train.jsonl:1: messages[1].content is absent or null; give it text",
    ),
    Broken(
        "content is a number",
        lines(message(role="assistant", content=42)),
        "train.jsonl:1: messages[1].content must be a string, not 42; correct the value",
    ),
    Broken(
        "content is a list of parts",
        lines(message(role="assistant", content=[{"type": "text", "text": "world"}])),
        'train.jsonl:1: messages[1].content must be a string, not [{"type": "text", "text": "world"}]; correct the value',
    ),
    Broken(
        "content of an assistant is empty",
        lines(message(role="assistant", content=" ")),
        "train.jsonl:1: messages[1].content of the assistant is empty; give it text or remove the row",
    ),
    Broken(
        "no assistant",
        lines(message(role="user", content="world")),
        "train.jsonl:1: no assistant message, so there is nothing to learn; add one or set lossOn: All",
    ),
    Broken(
        "tools is no list",
        lines({**GOOD, "tools": {"name": "search"}}),
        'train.jsonl:1: tools must be a list of JSON schemas, not {"name": "search"}; correct the row',
    ),
    Broken(
        "id twice with other content",
        lines({"id": "a", "text": "hello"}, {"id": "b", "text": "hello"}, {"id": "a", "text": "world"}),
        "train.jsonl:3: id 'a' stands also in line 1 with other content; make ids unique or remove the wrong row",
    ),
    Broken(
        "over-long row with Fail",
        lines(GOOD, conversation("hello", "the answer " * 30)),
        "train.jsonl:2: 72 tokens, more than maxSequenceLength 16; shorten the row, raise spec.dataset.maxSequenceLength or set truncation to Drop or Truncate",
        dataset={"maxSequenceLength": 16, "truncation": "Fail"},
    ),
    Broken(
        "every row over-long",
        lines(GOOD, GOOD),
        "spec.dataset.train: no usable row among 2 (2 longer than maxSequenceLength 8); raise spec.dataset.maxSequenceLength or give shorter rows",
        dataset={"maxSequenceLength": 8},
    ),
    Broken(
        "no label within the length",
        lines(conversation("the answer " * 30, "world")),
        "spec.dataset.train: no usable row among 1 (1 without a label within maxSequenceLength 8); raise spec.dataset.maxSequenceLength or give shorter rows",
        dataset={"maxSequenceLength": 8, "truncation": "Truncate"},
    ),
    Broken(
        "weight that selects no row",
        lines(GOOD),
        "spec.dataset.train: no usable row among 1 (1 not selected by the weight); raise the weight",
        source={"weight": 0.0001},
    ),
    Broken(
        "validation source missing",
        lines(GOOD),
        "spec.dataset.validation.sources[0].uri: file:///no/such/file.jsonl does not exist; correct the path",
        dataset={"validation": {"sources": [{"uri": "file:///no/such/file.jsonl"}]}},
    ),
    Broken(
        "validation fraction too small",
        lines(*conversations(3)),
        "spec.dataset.validation.fraction: 0.0001 holds out none of 3 usable rows; raise it, add rows or name spec.dataset.validation.sources",
        dataset={"validation": {"fraction": 0.0001}},
    ),
    Broken(
        "validation fraction too large",
        lines(GOOD),
        "spec.dataset.validation.fraction: 0.9999 holds out every one of 1 usable rows; lower it",
        dataset={"validation": {"fraction": 0.9999}},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_a_broken_data_set_is_one_sentence(case: Broken, bench: Workbench) -> None:
    bench.path("x").parent.mkdir(parents=True)
    case.write(bench.path("x").parent)
    with pytest.raises(DataError) as caught:
        bench.prepare([{"uri": bench.uri(case.train), **case.source}], **case.dataset)
    assert str(caught.value) == case.message.replace("{uri}", f"file://{bench.path('x').parent}")
    assert not (bench.home / "output").exists()
    left = bench.home / "cache" / "data"
    assert not left.exists() or [path for path in left.iterdir() if path.is_dir()] == []


def test_there_are_at_least_25_broken_data_sets() -> None:
    assert len({case.message for case in CASES}) >= 25
