"""Published artifacts: immutable directories named by their content, and one small pointer to the newest.

<prefix>artifacts/3f9a5c0b12de/adapter_model.safetensors ... manifest.json
<prefix>latest.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from finetune_api.errors import StorageError
from finetune_api.fields import SchemaModel
from finetune_api.report import ArtifactManifest, Sha256
from finetune_storage.bundle import MANIFEST, DamagedBundle, fetch_bundle, read_manifest, write_file
from finetune_storage.store import ObjectNotFound, ObjectStore

ARTIFACTS = "artifacts"
POINTER = "latest.json"


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

    ``store`` is the artifact's directory or the job's artifact prefix. ``destination`` must be absent or empty; it
    appears only when everything is verified.

    Raises:
        ObjectNotFound: nothing is published there.
        DamagedBundle: lists every file that is missing, truncated or altered.
        StorageError: ``destination`` holds something.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise StorageError(f"'{destination}' is not empty; choose another directory for the artifact.")
    place, manifest, sha256 = find_artifact(store)
    if manifest_sha256 is not None and sha256 != manifest_sha256:
        raise DamagedBundle(place.uri, [f"{MANIFEST} has sha256 {sha256[:12]}… instead of {manifest_sha256[:12]}…."])
    fetch_bundle(place, "", ArtifactManifest, destination)
    return manifest
