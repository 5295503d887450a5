"""Which commit of a hub model a job uses: decided once, the same for every node and every restart.

Without ``spec.model.revision`` the first launcher asks the hub what its default branch is at and writes the answer
beside the checkpoints, where no second one can be written. Everybody else reads it and asks nobody.
"""

from __future__ import annotations

import logging
import time
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from finetune_api.errors import StorageError, StorageUnavailable
from finetune_api.fields import SchemaModel
from finetune_api.trainer_config import TrainerConfig
from finetune_storage import ObjectNotFound, ObjectStore
from finetune_storage.store import ConditionalWriteUnsupported
from finetune_trainer.hub_files import repository, resolve_commit

log = logging.getLogger(__name__)

RECORD = "base-model.json"
_READS = 10
_PAUSE_SECONDS = 0.5


class BaseModelRecord(SchemaModel):
    """``<artifactPrefix>base-model.json``, written once and never changed."""

    schema_version: Literal[1] = 1
    uri: str  # hf://org/name
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


def fix_revision(config: TrainerConfig) -> TrainerConfig:
    """The configuration with the commit of an ``hf://`` model in its plan; of other models it is returned as it is.

    Raises:
        ModelError: the repository does not exist, or may not be read.
        StorageError, StorageUnavailable: the record is damaged, or hub or store refuse or are away.
    """
    if not config.spec.model.uri.startswith("hf://"):
        return config
    name, revision = repository(config.spec.model)
    if revision is None:
        revision = _recorded(ObjectStore.open_location(config.spec.output, uri=config.plan.artifact_prefix), name)
        log.info("the base model of this job is hf://%s@%s", name, revision)
    return config.model_copy(update={"plan": config.plan.model_copy(update={"model_revision": revision})})


def _recorded(store: ObjectStore, name: str) -> str:
    """The commit that the job's record names; written here if nobody has."""
    resolved = None
    for number in range(_READS):
        if number > 1:  # the store refused ours because of another one that is not yet there
            time.sleep(_PAUSE_SECONDS)
        if (found := _read(store, name)) is not None:
            return found
        resolved = resolved or resolve_commit(name)
        if _create(store, BaseModelRecord(uri=f"hf://{name}", revision=resolved)):
            return resolved
    raise StorageUnavailable(
        f"{store.join(RECORD)} can neither be written nor read, tried {_READS} times; start the job again."
    )


def _read(store: ObjectStore, name: str) -> str | None:
    try:
        content = store.get(RECORD)
    except ObjectNotFound:
        return None
    try:
        record = BaseModelRecord.model_validate_json(content)
    except ValidationError:
        raise _damaged(store, name, "it names no commit") from None
    if record.uri != f"hf://{name}":
        raise _damaged(store, name, "it is of another model")
    return record.revision


def _damaged(store: ObjectStore, name: str, fault: str) -> StorageError:
    return StorageError(
        f"{store.join(RECORD)}, which fixes the commit of hf://{name} for this job, is damaged ({fault}); "
        f"restore it, or delete {store.uri} to start from the beginning."
    )


def _create(store: ObjectStore, record: BaseModelRecord) -> bool:
    try:
        return store.create(RECORD, (record.model_dump_json(by_alias=True, indent=2) + "\n").encode())
    except ConditionalWriteUnsupported as error:
        hint = "Or write the commit into spec.model.revision: then nothing has to be recorded."
        raise ConditionalWriteUnsupported(str(error), hint) from None
