"""What a run is made from, byte for byte: the same on every rank, and in every attempt that goes on from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_api.errors import CheckpointError, DataError
from finetune_trainer.data import PreparedData
from finetune_trainer.model_files import fingerprints
from finetune_trainer.worker_config import WorkerConfig

_MODEL = "spec.model"
_COMMIT = f"the commit of {_MODEL}"
_SHOWN = 4


def made_from(config: WorkerConfig, data: PreparedData) -> dict[str, str]:
    """Every data file with its sha256; the commit of a hub model, or each file of another one with its fingerprint.

    By the words that messages use.
    """
    found = {
        f"{file['name']} of {source['source']}": str(file["sha256"])
        for source in data.counts["sources"]
        for file in source["files"]
    }
    if commit := config.trainer.plan.model_revision:
        return {**found, _COMMIT: commit}
    model = fingerprints(config.trainer, Path(config.model_directory))
    return {**found, **{f"{name} of {_MODEL}": digest for name, digest in model.items()}}


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
    """A checkpoint counts rows of data and holds changes to a model: it goes on with the very ones it was made from.

    Old ones name no rows, or no files of the model: what they do not name is not compared.

    Raises:
        CheckpointError: something changed since ``uri`` was written.
    """
    if not any(name.endswith(f" of {_MODEL}") for name in then):
        now = {name: digest for name, digest in now.items() if not name.endswith(f" of {_MODEL}")}
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
