"""What a run is made from, byte for byte: the same on every rank, and in every attempt that goes on from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from finetune_api.errors import CheckpointError, DataError
from finetune_api.plan import Plan
from finetune_trainer.data import PreparedData

_MODEL = "the commit of spec.model"
_SHOWN = 4


def made_from(plan: Plan, data: PreparedData) -> dict[str, str]:
    """Every data file with its sha256, and the commit of a hub model; by the words that messages use."""
    found = {
        f"{file['name']} of {source['source']}": str(file["sha256"])
        for source in data.counts["sources"]
        for file in source["files"]
    }
    return {**found, _MODEL: plan.model_revision} if plan.model_revision else found


def check_ranks_agree(own: Mapping[str, str], gather: Callable[[Any], Sequence[Any]]) -> None:
    """Nodes read for themselves, one after the other. Tables may be long: they are gathered only if they differ.

    Raises:
        DataError: something changed between them; the same on every rank.
    """
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len({*gather(digest)}) == 1:
        return
    told = gather(dict(own))
    for rank, other in enumerate(told):
        if other != told[0]:
            raise DataError(
                f"Rank {rank} read other input than rank 0: {_listed(told[0], other)}; "
                "input must stay as it is while a job runs.",
                hint="Run the job again when nobody writes there any more, or give it a copy that nobody changes.",
            )


def check_unchanged(uri: str, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """A checkpoint counts rows, so it goes on with the very rows it was made from. Old ones do not name them.

    Raises:
        CheckpointError: something changed since ``uri`` was written.
    """
    if then and then != now:
        raise CheckpointError(
            f"The checkpoint {uri} was made from other input: {_listed(then, now)}; "
            "input must stay as it is while a job runs: put it back as it was (take a new file away) and run the job "
            "again, or start anew under another name or output.uri."
        )


def _listed(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    changes = [*_changes(then, now)]
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return ", ".join(changes[:_SHOWN]) + more


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*then, *now}):
        if name not in now:
            yield f"{name} is gone"
        elif name not in then:
            yield f"{name} is new"
        elif then[name] != now[name]:
            yield f"{name} has changed"
