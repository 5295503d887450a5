"""Errors for people: one sentence per problem on standard error."""

from __future__ import annotations

import sys

from finetune_api.errors import FineTuneError, SpecError


def complain(error: FineTuneError, source: str = "") -> None:
    """Print the sentence and the hint; of an invalid manifest every problem, each with its ``source``."""
    if isinstance(error, SpecError):
        for problem in error.problems:
            place = f"{source}: " if source and problem.path != source else ""
            print(f"{place}{problem}", file=sys.stderr)
        return
    hint = f"; {error.hint}" if error.hint else ""
    print(f"{str(error).rstrip('.') if hint else error}{hint}", file=sys.stderr)
