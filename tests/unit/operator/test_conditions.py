"""Conditions keep all that the schema allows, and say what they leave out."""

from __future__ import annotations

import pytest
from tests.unit.operator.job_life import text

from finetune_api.status import Condition
from finetune_operator.conditions import Say, merge
from finetune_operator.sentences import CONDITION_LENGTH, listed


def accepted(message: str) -> str:
    (found,) = merge((), {"Accepted": Say(False, "InvalidSpec", message)}, 1, text(0))
    return found.message


def test_the_longest_message_is_the_one_that_the_schema_allows() -> None:
    assert Condition.model_json_schema()["properties"]["message"]["maxLength"] == CONDITION_LENGTH


def test_a_condition_keeps_every_problem_that_fits() -> None:
    problems = "\n".join(f"spec.field{number}: is wrong; mend it" for number in range(900))
    assert 4096 < len(problems) <= CONDITION_LENGTH
    assert accepted(problems) == problems


def test_a_condition_that_is_too_long_says_how_many_problems_are_left_out() -> None:
    lines = [f"{number:04d} {'x' * 1000}" for number in range(100)]
    message = accepted("\n".join(lines))
    kept = message.split("\n")
    assert len(message) <= CONDITION_LENGTH
    assert kept[:-1] == lines[: len(kept) - 1]
    assert kept[-1] == f"... and {100 - (len(kept) - 1)} more"
    assert accepted(message) == message


@pytest.mark.parametrize(
    ("lines", "length", "expected"),
    [
        ([], 20, ""),
        (["a", "b"], 20, "a\nb"),
        (["a" * 10, "b" * 9], 20, "a" * 10 + "\n" + "b" * 9),
        (["a" * 5, "b" * 9, "c" * 9], 20, "a" * 5 + "\n... and 2 more"),
        (["a" * 30], 20, "a" * 17 + "..."),
    ],
)
def test_lists_are_cut_between_their_lines(lines: list[str], length: int, expected: str) -> None:
    assert listed(lines, length) == expected
