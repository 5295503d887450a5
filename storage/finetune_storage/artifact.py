"""Published artifacts: immutable directories named by their content, and one small pointer to the newest.

<prefix>artifacts/3f9a5c0b12de/adapter_model.safetensors ... manifest.json
<prefix>latest.json
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from finetune_api.errors import FineTuneError, StorageError
from finetune_api.fields import SchemaModel
from finetune_api.report import ArtifactManifest, Sha256
from finetune_storage.bundle import (
    MANIFEST,
    DamagedBundle,
    fetch_bundle,
    files_of,
    holds_files,
    local_problem,
    parse_manifest,
    read_manifest,
    staging_directory,
    write_file,
)
from finetune_storage.store import ObjectNotFound, ObjectStore

ARTIFACTS = "artifacts"
POINTER = "latest.json"
_ANOTHER = "choose another directory for the artifact"


class ArtifactPointer(SchemaModel):
    """``latest.json``: replaced by one atomic write after the artifact it names was verified."""

    schema_version: Literal[1] = 1
    directory: str  # relative to the pointer, "artifacts/3f9a5c0b12de"
    manifest_sha256: Sha256


def read_pointer(store: ObjectStore) -> ArtifactPointer | None:
    """The pointer under an artifact prefix; ``None`` before anything was published.

    Raises:
        DamagedBundle: it is there but unreadable.
    """
    try:
        content = store.get(POINTER)
    except ObjectNotFound:
        return None
    try:
        return ArtifactPointer.model_validate_json(content)
    except ValidationError:
        raise DamagedBundle(store.uri, [f"{POINTER} is not readable."]) from None


def write_pointer(store: ObjectStore, directory: str, manifest_sha256: str) -> None:
    """Point at a verified artifact."""
    pointer = ArtifactPointer(directory=directory, manifest_sha256=manifest_sha256)
    write_file(store, POINTER, (pointer.model_dump_json(by_alias=True, indent=2) + "\n").encode())


def find_artifact(store: ObjectStore) -> tuple[ObjectStore, ArtifactManifest, str]:
    """The directory, manifest and manifest's sha256 of an artifact, from its own URI or from the job's prefix.

    Raises:
        ObjectNotFound: nothing is published there.
        DamagedBundle: the manifest is unreadable or not the one the pointer names.
    """
    pointer = None if store.exists(MANIFEST) else read_pointer(store)
    place = store.child(pointer.directory) if pointer else store
    try:
        manifest, sha256 = read_manifest(place, "", ArtifactManifest)
    except ObjectNotFound:
        if pointer:
            raise DamagedBundle(place.uri, [f"'{MANIFEST}' is missing."]) from None
        raise ObjectNotFound(f"No artifact is published at {store.uri}; give the URI that the job reported.") from None
    if pointer and pointer.manifest_sha256 != sha256:
        raise DamagedBundle(place.uri, [f"{MANIFEST} is not the one that {POINTER} names."])
    return place, manifest, sha256


def fetch_artifact(store: ObjectStore, destination: Path, *, manifest_sha256: str | None = None) -> ArtifactManifest:
    """Download an artifact and verify every file; ``manifest_sha256`` also ties it to what the job reported.

    ``store`` is the artifact's directory or the job's artifact prefix. ``destination`` must be absent or empty, or
    hold this very artifact, which then is verified and not downloaded; files appear only when everything is verified.

    Raises:
        ObjectNotFound: nothing is published there.
        DamagedBundle: lists every file that is missing, truncated or altered.
        StorageError: ``destination`` holds something else, or cannot be written.
    """
    full = check_destination(destination)
    if full and manifest_sha256 is not None:
        return _fetched_before(destination, manifest_sha256)
    if full and not (destination / MANIFEST).is_file():
        raise _not_empty(destination)
    place, manifest, sha256 = find_artifact(store)
    if manifest_sha256 is not None and sha256 != manifest_sha256:
        raise DamagedBundle(place.uri, [f"{MANIFEST} has sha256 {sha256[:12]}… instead of {manifest_sha256[:12]}…."])
    if full:
        return _fetched_before(destination, sha256)
    with _local_trouble(destination):
        fetch_bundle(place, "", ArtifactManifest, destination)
    return manifest


def check_destination(destination: Path) -> bool:
    """Whether something lies in ``destination``; an absent or empty one can be filled.

    Raises:
        StorageError: it is no directory, or cannot be written.
    """
    with _local_trouble(destination):
        if destination.is_dir():
            if holds_files(destination):
                return True
        elif os.path.lexists(destination):
            raise StorageError(f"'{destination}' is not a directory; {_ANOTHER}.")
        _try_out(Path(os.path.abspath(destination)))
    return False


def _not_empty(destination: Path) -> StorageError:
    return StorageError(f"'{destination}' is not empty; {_ANOTHER}.")


@contextmanager
def _local_trouble(destination: Path) -> Iterator[None]:
    """What the local file system refuses, as a sentence about ``destination``."""
    try:
        yield
    except FineTuneError:  # some are an OSError too, and have their sentence
        raise
    except OSError as error:
        raise StorageError(f"'{destination}' cannot be written ({error.strerror}); {_ANOTHER}.") from error


def _try_out(destination: Path) -> None:
    """Make the directory that a download begins with, and remove it again."""
    staging = staging_directory(destination)
    made = [directory for directory in (staging, *staging.parents) if not directory.exists()]
    try:
        staging.mkdir(parents=True, exist_ok=True)
    finally:
        for directory in made:
            with suppress(OSError):
                directory.rmdir()


def _fetched_before(destination: Path, sha256: str) -> ArtifactManifest:
    """The manifest of an artifact that was fetched to ``destination`` earlier.

    Raises:
        StorageError: something else lies there, or files of the artifact have changed.
    """
    with _local_trouble(destination):
        file = destination / MANIFEST
        content = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise _not_empty(destination)
        manifest = parse_manifest(content, ArtifactManifest, str(destination))
        problems = [problem for entry in files_of(manifest) if (problem := local_problem(destination, entry))]
    if problems:
        raise StorageError(
            f"'{destination}' holds this artifact, changed since it was fetched: {' '.join(problems)}"
            f" Remove it, or {_ANOTHER}."
        )
    return manifest
