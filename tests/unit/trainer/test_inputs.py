"""What changed between two readings of the same job's input, in words."""

from __future__ import annotations

import pytest

from finetune_api.errors import CheckpointError, DataError
from finetune_trainer.inputs import check_ranks_agree, check_unchanged

FIRST = {"a.jsonl of spec.dataset.train[0]": "1", "b.jsonl of spec.dataset.train[0]": "2"}


def test_ranks_that_read_the_same_agree() -> None:
    check_ranks_agree([FIRST, dict(FIRST)])


def test_a_file_that_changed_between_two_nodes_is_named_on_every_rank() -> None:
    other = {"b.jsonl of spec.dataset.train[0]": "3", "c.jsonl of spec.dataset.train[0]": "4"}
    with pytest.raises(DataError) as caught:
        check_ranks_agree([FIRST, FIRST, other, other])
    assert str(caught.value) == (
        "Rank 2 read other input than rank 0: a.jsonl of spec.dataset.train[0] is gone, b.jsonl of "
        "spec.dataset.train[0] has changed, c.jsonl of spec.dataset.train[0] is new; "
        "input must stay as it is while a job runs."
    )
    assert caught.value.hint == (
        "Run the job again when nobody writes there any more, or give it a copy that nobody changes."
    )


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
