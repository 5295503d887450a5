"""Rules over several fields, and ``parse_spec``: any object -> FineTuneJobSpec, or every problem at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from finetune_api.errors import Problem, SpecError
from finetune_api.introspect import Path
from finetune_api.planner import specification_problems
from finetune_api.rules import ask
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_rules import PLACE_RULES, SPEC_RULES, Placed
from finetune_api.structure import read_structure


class Place(StrEnum):
    """Where the job is to run, as far as this decides what is valid."""

    LOCAL = "local"
    CLUSTER = "cluster"


def parse_spec(obj: Any, lines: Mapping[Path, int] | None = None, place: Place | None = None) -> FineTuneJobSpec:
    """The spec of a job from plain data (parsed YAML or JSON).

    ``lines`` maps paths from the top of the file (``("spec", "training")``) to line numbers. With ``place``, URIs that
    do not exist there are refused as well.

    Raises:
        SpecError: every problem, in the order of the file where lines are known.
    """
    spec, problems = judge_spec(obj, lines or {}, place)
    if problems:
        raise SpecError(problems)
    return spec


def judge_spec(obj: Any, lines: Mapping[Path, int], place: Place | None) -> tuple[FineTuneJobSpec, list[Problem]]:
    """The spec as far as it can be read, and everything wrong with it."""

    def line_of(path: Path) -> int | None:
        while path:
            if path in lines:
                return lines[path]
            path = path[:-1]
        return None

    structure = read_structure(FineTuneJobSpec, obj, ("spec",), line_of)
    spec, broken = structure.value, structure.broken
    problems = list(structure.problems)
    if () not in broken:
        problems += _located(_rule_problems(spec, broken, place), line_of)
    return spec, problems


def _rule_problems(spec: FineTuneJobSpec, broken: frozenset[Path], place: Place | None) -> Iterator[Problem]:
    yield from ask(SPEC_RULES, spec, broken)
    if place is not None:
        yield from ask(PLACE_RULES, Placed(spec, place is Place.CLUSTER), broken)
    yield from specification_problems(spec, broken)


def _located(problems: Iterator[Problem], line_of: Any) -> Iterator[Problem]:
    for problem in problems:
        path = split_path(problem.path)
        yield Problem(problem.path, problem.value, problem.rule, problem.remedy, line_of(path))


def split_path(text: str) -> Path:
    """``spec.dataset.train[0].uri`` -> ("spec", "dataset", "train", 0, "uri")."""
    parts: list[str | int] = []
    for part in text.split("."):
        name, bracket, index = part.partition("[")
        parts.append(name)
        if bracket and index.rstrip("]").isdigit():
            parts.append(int(index.rstrip("]")))
    return tuple(parts)
