"""What changed between two readings of the same job's input, in words."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from finetune_api.errors import CheckpointError, DataError
from finetune_trainer.inputs import check_ranks_agree, check_unchanged

FIRST = {"a.jsonl of spec.dataset.train[0]": "1", "b.jsonl of spec.dataset.train[0]": "2"}


def ask_on_every_rank(tables: list[dict[str, str]]) -> tuple[list[Exception | None], list[Any]]:
    """What every rank raises, and what each gathered."""
    ranks = len(tables)
    gathered: list[Any] = []
    meeting, places = threading.Barrier(ranks, timeout=30), [None] * ranks

    def of(rank: int) -> Exception | None:
        def gather(value: Any) -> list[Any]:
            places[rank] = value
            gathered.append(value)
            meeting.wait()
            everything = [*places]
            meeting.wait()
            return everything

        try:
            check_ranks_agree(tables[rank], gather)
        except DataError as error:
            return error
        return None

    with ThreadPoolExecutor(ranks) as pool:
        return [*pool.map(of, range(ranks))], gathered


def test_ranks_that_read_the_same_agree_without_telling_each_other_every_file() -> None:
    many = {f"{n}.jsonl": "0" * 64 for n in range(20_000)}
    told, gathered = ask_on_every_rank([many, dict(reversed(many.items()))])
    assert told == [None, None]
    assert [len(value) for value in gathered] == [64, 64]


def test_a_file_that_changed_between_two_nodes_is_named_on_every_rank() -> None:
    other = {"b.jsonl of spec.dataset.train[0]": "3", "c.jsonl of spec.dataset.train[0]": "4"}
    told, _ = ask_on_every_rank([FIRST, FIRST, other, other])
    assert {(str(error), getattr(error, "hint", None)) for error in told} == {
        (
            "Rank 2 read other input than rank 0: a.jsonl of spec.dataset.train[0] is gone, b.jsonl of "
            "spec.dataset.train[0] has changed, c.jsonl of spec.dataset.train[0] is new; "
            "input must stay as it is while a job runs.",
            "Run the job again when nobody writes there any more, or give it a copy that nobody changes.",
        )
    }


def test_another_commit_of_the_base_model_is_no_base_for_a_checkpoint() -> None:
    with pytest.raises(CheckpointError) as caught:
        check_unchanged("s3://b/c/", {"the commit of spec.model": "1"}, {"the commit of spec.model": "2"})
    assert str(caught.value) == (
        "The checkpoint s3://b/c/ was made from other input: the commit of spec.model has changed; "
        "input must stay as it is while a job runs: put it back as it was (take a new file away) and run the job "
        "again, or start anew under another name or output.uri."
    )


def test_many_changes_are_counted() -> None:
    with pytest.raises(
        CheckpointError, match=r"f0 is new, f1 is new, f2 is new, f3 is new and 5 more; input must stay"
    ):
        check_unchanged("s3://b/c/", {"z": "0"}, {"z": "0", **{f"f{n}": "1" for n in range(9)}})


def test_a_checkpoint_that_names_no_input_is_taken_as_it_is() -> None:
    check_unchanged("s3://b/c/", {}, FIRST)


def test_a_checkpoint_that_names_no_file_of_the_model_is_judged_by_its_data_alone() -> None:
    model = {"config.json of spec.model": "1", "model.safetensors of spec.model": "2"}
    check_unchanged("s3://b/c/", FIRST, {**FIRST, **model})
    with pytest.raises(CheckpointError, match=r"model\.safetensors of spec\.model has changed; input must"):
        check_unchanged("s3://b/c/", {**FIRST, **model}, {**FIRST, **model, "model.safetensors of spec.model": "3"})
