"""docs/status.md says what the operator does."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_operator import checks, derive, story
from finetune_operator.conditions import ORDER
from finetune_operator.failures import POLICIES

PAGE = (Path(__file__).parents[3] / "docs" / "status.md").read_text(encoding="utf-8")
CODE = "".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in (checks, derive, story))


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without marks."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip(" `*\\") for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_cause_is_documented_with_its_budget_and_words() -> None:
    expected = [[str(cause), policy.budget.value, policy.words] for cause, policy in POLICIES.items()]
    assert rows("Attempts, and what an end means") == expected


def test_every_condition_is_documented_in_order() -> None:
    assert [name for name, _ in rows("Conditions")] == list(ORDER)


def test_every_state_and_every_event_is_documented() -> None:
    states = set(re.findall(r'(?:Judgement\(\s*|_alive\(at, |"state": |state = )"([A-Z]\w+)"', CODE))
    states |= set(re.findall(r'state = "(\w+)" if started else "(\w+)"', CODE)[0])
    assert {name for name, _ in rows("States")} == states
    assert {name for name, _ in rows("Events")} == set(re.findall(r'Event\("(\w+)"', CODE))
