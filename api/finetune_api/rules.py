"""The form of a rule: a small pure question, and the fields it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from finetune_api.errors import Problem
from finetune_api.introspect import Path

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """``check`` is asked only where every field of ``reads`` (paths below ``spec``) is sound."""

    reads: tuple[str, ...]
    check: Callable[[Subject], Iterator[Problem]]


def ask(rules: Iterable[Rule[Subject]], subject: Subject, broken: Iterable[Path] = ()) -> Iterator[Problem]:
    """The answers of every rule that can be judged although the ``broken`` fields cannot."""
    damaged = [tuple(part for part in path if isinstance(part, str)) for path in broken]
    for rule in rules:
        fields = [tuple(field.split(".")) for field in rule.reads]
        if not any(_touches(field, path) for field in fields for path in damaged):
            yield from rule.check(subject)


def _touches(field: tuple[str, ...], path: tuple[str, ...]) -> bool:
    shared = min(len(field), len(path))
    return field[:shared] == path[:shared]
