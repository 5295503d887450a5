"""Trouble that a user can mend, told in one sentence: what is wrong, which object, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_api.exits import ExitClass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a manifest. ``path`` is spelled as the user typed it (``spec.training.epochs``)."""

    path: str
    value: Any
    rule: str
    remedy: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.path} (line {self.line})" if self.line else self.path
        shown = ""
        if self.value is not None:
            shown = f", not {_shown(self.value)}" if self.rule.startswith("must ") else f" ({_shown(self.value)})"
        return f"{place}: {self.rule}{shown}; {self.remedy}"


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class FineTuneError(Exception):
    """Base of every error whose text is meant for a user. ``exit_class`` decides the process's exit code."""

    exit_class: ExitClass = ExitClass.INTERNAL_ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SpecError(FineTuneError, ValueError):
    """An invalid manifest: carries every problem, not the first one."""

    exit_class = ExitClass.INVALID_SPEC

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(FineTuneError, ValueError):
    """A data set that cannot be trained on: names the file, the line or row, and the remedy."""

    exit_class = ExitClass.INVALID_DATA


class ModelError(FineTuneError, ValueError):
    """A base model that cannot be loaded or trained as asked."""

    exit_class = ExitClass.INVALID_MODEL


class StorageError(FineTuneError, OSError):
    """Object storage refused for good: wrong credentials, absent bucket, forbidden URI. Not retried."""

    exit_class = ExitClass.STORAGE_REFUSED


class StorageUnavailable(FineTuneError, OSError):
    """Object storage did not answer although retried for the whole retry budget."""

    exit_class = ExitClass.STORAGE_UNAVAILABLE


class SelfCheckError(FineTuneError):
    """What really runs differs from the plan (step-0 self-check)."""

    exit_class = ExitClass.SELF_CHECK_FAILED


class NumericalError(FineTuneError, ArithmeticError):
    """Loss or gradient became NaN or infinite: names the step and the samples."""

    exit_class = ExitClass.NUMERICAL_ERROR


class CheckpointError(FineTuneError):
    """No usable checkpoint although one was demanded, or one that belongs to another job."""

    exit_class = ExitClass.CHECKPOINT_UNUSABLE
