"""Prepared data end to end: kinds of files, splits, weights, packing, truncation, cache, kills, races."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tests.builders import CHATML, conversation, conversations, texts, write_jsonl
from tests.unit.trainer.data.rig import Workbench, trainer_config

from finetune_api.errors import DataError
from finetune_trainer.data import PreparedData, TokenDataset, prepare


def contents(data: TokenDataset) -> list[tuple[int, ...]]:
    """Every segment's tokens, sorted: the same for any packing and order."""
    segments = []
    for row in range(len(data)):
        sample = data[row]
        cuts = np.cumsum(sample.segment_lengths)[:-1]
        segments += [tuple(part.tolist()) for part in np.split(sample.input_ids, cuts)]
    return sorted(segments)


def test_every_kind_of_file_gives_the_same_samples(bench: Workbench) -> None:
    rows = conversations(20)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"):
        write_jsonl(bench.path(name), rows)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, bench.path("a.parquet"))
    pyarrow.feather.write_feather(table, str(bench.path("a.feather")))
    with pyarrow.ipc.new_stream(str(bench.path("a.arrow")), table.schema) as stream:
        stream.write_table(table)
    with bench.path("a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages"])
        writer.writerows([json.dumps(row["messages"])] for row in rows)
    expected = contents(bench.prepare("a.jsonl").train)
    assert len(expected) == 20
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet", "a.feather", "a.arrow", "a.csv"):
        assert contents(bench.prepare(name).train) == expected, name


def test_a_file_may_hold_several_compressed_frames(bench: Workbench) -> None:
    rows = conversations(8)
    for suffix in ("gz", "zst"):
        parts = [write_jsonl(bench.path(f"{i}.jsonl.{suffix}"), rows[i::2]).read_bytes() for i in range(2)]
        bench.path(f"both.jsonl.{suffix}").write_bytes(b"".join(parts))
        assert bench.prepare(f"both.jsonl.{suffix}").counts["rowsRead"] == 8


def test_prompt_completion_and_text_from_csv_with_quoted_lines(bench: Workbench) -> None:
    bench.path("x").parent.mkdir(parents=True)
    bench.path("a.csv").write_text('prompt,completion\n"hello, you\nand ",world\nthe ,"a ""value"""\n')
    data = bench.prepare("a.csv")
    tokenizer = bench.tokenizer()
    decoded = [tokenizer.decode(data.train[row].input_ids.tolist()) for row in range(2)]
    assert decoded == ["hello, you\nand world<|im_end|>", 'the a "value"<|im_end|>']
    assert [data.train.origin(row) for row in range(2)] == ["a.csv:3", "a.csv:4"]
    bench.path("b.csv").write_text("text\nhello\n")
    assert bench.prepare("b.csv").counts["sources"][0]["format"] == "Text"


def test_globs_and_directories(bench: Workbench) -> None:
    rows = texts(6)
    for i, name in enumerate(["a/1.jsonl", "a/2.jsonl.gz", "b/c/3.jsonl", "b/c/_SUCCESS.jsonl", ".hidden/4.jsonl"]):
        write_jsonl(bench.path(name), [rows[i]])
    bench.path("a/notes.txt").write_text("not data")

    def names(pattern: str) -> list[str]:
        files = bench.prepare([{"uri": bench.uri(pattern)}]).counts["sources"][0]["files"]
        return [file["name"] for file in files]

    assert names("a/*.jsonl") == ["1.jsonl"]
    assert names("a/*") == ["1.jsonl", "2.jsonl.gz"]
    assert names("**/*.jsonl") == ["a/1.jsonl", "b/c/3.jsonl"]
    assert names("b") == ["c/3.jsonl"]
    assert names("") == ["a/1.jsonl", "a/2.jsonl.gz", "b/c/3.jsonl"]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(bench: Workbench) -> None:
    bench.path("a").parent.mkdir(parents=True)
    bench.path("train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\r\n\r\n{"text": "world"}')
    data = bench.prepare()
    assert data.counts["rowsRead"] == 2
    assert [data.train.origin(row) for row in range(2)] == ["train.jsonl:1", "train.jsonl:3"]


def test_counts_and_facts_of_a_small_set_are_exact(bench: Workbench) -> None:
    short, long = conversation("hello", "world"), conversation("hello", "the answer " * 10)
    write_jsonl(bench.path("train.jsonl"), [short, short, long, conversation("hello", "world <|im_end|>")])
    data = bench.prepare(maxSequenceLength=16, packing=True)
    tokens = [len(bench.tokenizer().apply_chat_template(row["messages"], return_dict=False)) for row in (short, long)]
    assert tokens[0] == 12
    assert tokens[1] > 16
    counts = data.counts
    assert counts["rowsRead"] == 4
    assert counts["rowsUsed"] == 3
    assert counts["dropped"] == {"tooLong": 1, "noSupervisedTokens": 0, "notSelected": 0}
    assert counts["duplicates"] == 1
    assert counts["controlTokenRows"] == 1
    assert counts["endTokens"] == 4
    assert counts["train"] == {
        "samples": 3,
        "rows": 3,
        "tokens": 12 + 12 + 14,
        "supervisedTokens": 2 + 2 + 4,
        "maskedShare": round(1 - 8 / 38, 6),
        "longestSample": 14,
        "packingEfficiency": round(38 / 48, 6),
    }
    assert data.train.lengths.tolist() == [14, 12, 12]
    assert data.train.supervised.tolist() == [4, 2, 2]
    facts = data.facts
    assert (facts.files, facts.train_samples, facts.validation_samples, facts.train_tokens) == (1, 3, 0, 38)
    assert facts.exact
    assert facts.digest == data.directory.name


def test_packed_rows_hold_the_same_samples_and_first_labels_are_masked(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(60))
    plain, packed = bench.prepare(), bench.prepare(packing=True, maxSequenceLength=128)
    assert contents(packed.train) == contents(plain.train)
    assert len(packed.train) < 30
    assert int(packed.train.lengths.max()) <= 128
    assert int(packed.train.lengths.sum()) == int(plain.train.lengths.sum())
    for row in range(len(packed.train)):
        sample = packed.train[row]
        assert len(sample.input_ids) == packed.train.lengths[row] == sample.segment_lengths.sum()
        assert int((sample.labels != -100).sum()) == packed.train.supervised[row]
        starts = np.cumsum(sample.segment_lengths) - sample.segment_lengths
        assert (sample.labels[starts] == -100).all()
        carried = sample.labels != -100
        assert (sample.labels[carried] == sample.input_ids[carried]).all()


def test_rows_of_loss_on_all_mask_the_first_token_of_each_segment(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(10))
    data = bench.prepare(packing=True, maxSequenceLength=256, lossOn="All")
    for row in range(len(data.train)):
        sample = data.train[row]
        starts = np.cumsum(sample.segment_lengths) - sample.segment_lengths
        assert np.flatnonzero(sample.labels == -100).tolist() == starts.tolist()


def test_truncation_keeps_the_head_and_drops_rows_without_a_label(bench: Workbench) -> None:
    prompt_too_long = conversation("the answer " * 20, "world")
    write_jsonl(bench.path("train.jsonl"), [conversation("hello", "the answer " * 20), prompt_too_long])
    data = bench.prepare(maxSequenceLength=20, truncation="Truncate")
    assert data.counts["truncated"] == 2
    assert data.counts["dropped"]["noSupervisedTokens"] == 1
    assert data.train.lengths.tolist() == [20]
    whole = bench.prepare(maxSequenceLength=2000)
    assert data.train[0].input_ids.tolist() == whole.train[0].input_ids[:20].tolist()


def test_a_truncated_text_keeps_its_head_and_has_no_end_token(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), [{"text": "the answer is " * 20}])
    data = bench.prepare(maxSequenceLength=8, truncation="Truncate")
    assert data.train.lengths.tolist() == [8]
    assert data.counts["endTokens"] == 0


def held_out(bench: Workbench, count: int) -> set[tuple[int, ...]]:
    write_jsonl(bench.path("train.jsonl"), conversations(count))
    data = bench.prepare(validation={"fraction": 0.3})
    assert data.validation is not None
    train, validation = contents(data.train), contents(data.validation)
    assert sorted(train + validation) == contents(bench.prepare().train)
    return set(validation)


def test_the_validation_fraction_is_stable_when_rows_are_added(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(100))
    first_rows = set(contents(bench.prepare().train))
    small, large = held_out(bench, 100), held_out(bench, 300)
    assert large & first_rows == small
    assert 15 <= len(small) <= 45
    assert 60 <= len(large) <= 120


def test_identical_rows_land_on_one_side(bench: Workbench) -> None:
    rows = conversations(50)
    write_jsonl(bench.path("a.jsonl"), rows)
    reordered = [{"messages": [dict(reversed(message.items())) for message in row["messages"]]} for row in rows]
    write_jsonl(bench.path("b.jsonl"), reordered)
    data = bench.prepare("*.jsonl", validation={"fraction": 0.3})
    assert data.validation is not None
    assert set(contents(data.train)).isdisjoint(contents(data.validation))
    assert data.counts["duplicates"] == 50


def test_weights_copy_and_select_rows_by_content(bench: Workbench) -> None:
    rows = conversations(400)
    write_jsonl(bench.path("train.jsonl"), rows)
    everything = contents(bench.prepare().train)

    def weighted(weight: float) -> PreparedData:
        return bench.prepare([{"uri": bench.uri("train.jsonl"), "weight": weight}])

    half, double, more = weighted(0.5), weighted(2), weighted(2.5)
    chosen = contents(half.train)
    assert 150 <= len(chosen) <= 250
    assert len(set(chosen)) == len(chosen)
    assert half.counts["dropped"]["notSelected"] == 400 - len(chosen)
    assert contents(double.train) == sorted(everything * 2)
    assert contents(more.train) == sorted(everything * 2 + chosen)


def test_a_held_out_row_is_measured_once_whatever_its_weight(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(100))
    plain = bench.prepare(validation={"fraction": 0.3})
    heavy = bench.prepare([{"uri": bench.uri("train.jsonl"), "weight": 3}], validation={"fraction": 0.3})
    assert plain.validation is not None
    assert heavy.validation is not None
    assert contents(heavy.validation) == contents(plain.validation)
    assert contents(heavy.train) == sorted(contents(plain.train) * 3)


def test_validation_sources_are_kept_apart_and_overlap_is_counted(bench: Workbench) -> None:
    rows = conversations(30)
    write_jsonl(bench.path("train.jsonl"), rows[:20])
    write_jsonl(bench.path("validation.jsonl"), rows[18:])
    data = bench.prepare(validation={"sources": [{"uri": bench.uri("validation.jsonl")}]})
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (20, 12)
    assert data.counts["overlap"] == 2
    assert data.counts["duplicates"] == 0
    assert data.validation.origin(0) == "validation.jsonl:1"
    assert len(data.samples) == 4
    first = data.samples[0]
    assert first["reference"] == rows[18]["messages"][1]["content"]
    assert (
        first["prompt"] == f"<|im_start|>user\n{rows[18]['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert bench.tokenizer().decode(first["prompt_ids"]) == first["prompt"]


def test_sources_of_several_formats_mix(bench: Workbench) -> None:
    write_jsonl(bench.path("chat.jsonl"), conversations(3))
    write_jsonl(bench.path("text.jsonl"), texts(4))
    both = {"messages": conversation("a", "b")["messages"], "text": "hello"}
    write_jsonl(bench.path("both.jsonl"), [both])
    sources = [{"uri": bench.uri("chat.jsonl")}, {"uri": bench.uri("text.jsonl")}]
    sources.append({"uri": bench.uri("both.jsonl"), "format": "Text"})
    data = bench.prepare(sources)
    assert [one["format"] for one in data.counts["sources"]] == ["Messages", "Text", "Text"]
    assert [one["rowsUsed"] for one in data.counts["sources"]] == [3, 4, 1]
    assert data.train.origin(7) == "both.jsonl:1"


def files_of(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def test_a_second_preparation_is_a_cache_hit(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(20))
    first = bench.prepare(validation={"fraction": 0.2})
    before = files_of(first.directory)
    bench.said.clear()
    second = bench.prepare(validation={"fraction": 0.2})
    assert bench.said == ["reading the data sources", f"found prepared data ({len(first.train)} rows)"]
    assert files_of(second.directory) == before
    assert second.counts == first.counts
    assert second.samples == first.samples
    assert second.facts == first.facts


def test_what_defines_the_tokens_defines_the_directory(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(20))
    write_jsonl(bench.path("moved/train.jsonl"), conversations(20))
    first = bench.prepare().directory
    assert bench.prepare("moved/train.jsonl").directory == first
    others = {bench.prepare(lossOn="All").directory, bench.prepare(maxSequenceLength=64).directory}
    write_jsonl(bench.path("train.jsonl"), conversations(21))
    others.add(bench.prepare().directory)
    (bench.model / "chat_template.jinja").write_text(CHATML.replace("user", "human") + " ")
    others.add(bench.prepare().directory)
    tool_template = bench.model / "additional_chat_templates" / "tool_use.jinja"
    tool_template.parent.mkdir()
    for text in (CHATML, CHATML + " "):
        tool_template.write_text(text)
        others.add(bench.prepare().directory)
    assert len(others | {first}) == 7


def test_preparation_is_reproducible_to_the_byte(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        bench = Workbench(tmp_path / name)
        write_jsonl(bench.path("train.jsonl"), conversations(200))
        data = bench.prepare(packing=True, maxSequenceLength=128, validation={"fraction": 0.1})
        found.append({path: content for path, (content, _) in files_of(data.directory).items()})
    counts = [json.loads(files.pop("prepared.json")) for files in found]
    assert found[0] == found[1]
    for document in counts:
        document["counts"]["sources"][0].pop("uri")
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["tokens.i32", "mask.u8", "train.rows.i64", "prepared.json"])
def test_damaged_prepared_data_is_noticed_and_built_again(bench: Workbench, name: str) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(20))
    first = bench.prepare()
    expected = contents(first.train)
    path = first.directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        PreparedData.open(first.directory)
    assert str(caught.value).startswith(str(first.directory))
    assert str(caught.value).endswith("; delete the directory and run the job again")
    assert contents(bench.prepare().train) == expected
    PreparedData.open(first.directory)


def _prepare_in_child(home: Path, said: Any, moment: str = "") -> None:
    """Says what it does; at ``moment`` it stands still until it is killed."""

    def say(line: str) -> None:
        said.put(line)
        if moment and line.startswith(moment):
            time.sleep(600)

    config = trainer_config(home, {"train": [{"uri": f"file://{home}/data/train.jsonl"}]})
    prepare(config, home / "model", say)
    said.put("done")


def test_a_preparer_killed_at_any_moment_leaves_nothing_half(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(4000))
    spawn = multiprocessing.get_context("fork")
    config = trainer_config(bench.home, {"train": [{"uri": bench.uri("train.jsonl")}]})
    home = bench.home / "cache" / "data"
    for moment in ("tokenised", "packing"):
        said = spawn.Queue()
        child = spawn.Process(target=_prepare_in_child, args=(bench.home, said, moment))
        child.start()
        while not said.get(timeout=60).startswith(moment):
            pass
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert [path.name for path in home.iterdir() if not path.name.startswith(".")] == []
        assert [path for path in home.iterdir() if path.is_dir()] != []
    data = prepare(config, bench.model, bench.said.append)
    assert data.counts["rowsUsed"] == 4000
    assert [path for path in home.iterdir() if path.is_dir()] == [data.directory]


def test_preparers_at_the_same_time_share_one_result(bench: Workbench) -> None:
    write_jsonl(bench.path("train.jsonl"), conversations(2000))
    spawn = multiprocessing.get_context("fork")
    queues = [spawn.Queue() for _ in range(3)]
    children = [spawn.Process(target=_prepare_in_child, args=(bench.home, queue)) for queue in queues]
    for child in children:
        child.start()
    said: list[list[str]] = [[] for _ in queues]
    deadline = time.monotonic() + 120
    for lines, queue in zip(said, queues, strict=True):
        while not lines or lines[-1] != "done":
            lines.append(queue.get(timeout=deadline - time.monotonic()))
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sum("packing" in lines for lines in said) == 1
    assert sum(any(line.startswith("found prepared data") for line in lines) for lines in said) == 2


def test_a_losing_preparer_takes_the_winner_s_result(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without file locks (some network file systems) two preparers finish; the rename decides."""
    import errno
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    write_jsonl(bench.path("train.jsonl"), conversations(50))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    inner: list[PreparedData] = []

    def meanwhile(message: str) -> None:
        if message == "ordering" and not inner:
            inner.append(bench.prepare())

    config = trainer_config(bench.home, {"train": [{"uri": bench.uri("train.jsonl")}], "packing": False})
    outer = prepare(config, bench.model, meanwhile)
    assert outer.directory == inner[0].directory
    assert [path for path in outer.directory.parent.iterdir() if path.is_dir()] == [outer.directory]
