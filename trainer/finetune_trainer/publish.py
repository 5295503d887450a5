"""Publication: the artifact's files into an immutable directory of their own, its manifest last.

A kill at any byte leaves the old artifact or the new one: files first, then ``manifest.json``, then one atomic
write of ``latest.json``. Publishing the same thing again finds it there, verifies it and changes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from finetune_api.errors import StorageError
from finetune_api.report import ArtifactManifest, FileEntry
from finetune_storage import (
    MANIFEST,
    DamagedBundle,
    ObjectNotFound,
    ObjectStore,
    commit,
    delete_bundle,
    file_digest,
    read_manifest,
    verify_bundle,
    write_file,
)
from finetune_storage.artifact import ARTIFACTS, ArtifactPointer, read_pointer, write_pointer

_PACKAGES = (
    "finetune-operator",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "numpy",
)
_ATTEMPTS = 2
_ABANDONED_AFTER = timedelta(days=1)


@dataclass(frozen=True)
class ArtifactDescription:
    """What a manifest says besides its files and the time. See ArtifactManifest for the fields."""

    job: Mapping[str, str]
    format: str
    base_model: Mapping[str, Any]
    dataset: Mapping[str, Any]
    seed: int
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Mapping[str, float]
    versions: Mapping[str, str] = field(default_factory=lambda: package_versions())


@dataclass(frozen=True)
class PublishedArtifact:
    """A verified artifact. ``bytes`` counts the listed files, without the manifest."""

    uri: str
    manifest_sha256: str
    files: int
    bytes: int


def package_versions() -> dict[str, str]:
    """Versions of what decides a result, of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def publish(
    store: ObjectStore,
    directory: Path,
    description: ArtifactDescription,
    extra: Mapping[str, Path] | None = None,
) -> PublishedArtifact:
    """Publish every file of ``directory`` (and ``extra``: path in the artifact to local file) below ``store``.

    Args:
        store: the job's artifact prefix.
        directory: in PEFT layout for an adapter, in transformers layout for a model.
        extra: what tells of the run (times, attempts) and so is not part of what names the artifact.

    Raises:
        StorageError, StorageUnavailable: what was written cannot be read back, or the store refuses or is away.
    """
    files = _collect(directory, extra or {})
    entries = tuple(FileEntry(path=path, sha256=sha, bytes=size) for path, (sha, size) in _digests(files).items())
    wanted = _manifest(description, entries)
    place = store.child(f"{ARTIFACTS}/{_content_name(wanted)}")
    found = _first_whole(store, wanted, extra or {})
    for _ in range(_ATTEMPTS):
        if found is None:
            _write(place, files, wanted)
            found = _first_whole(store, wanted, extra or {})
    if found is None:
        raise StorageError(
            f"{place.uri} is not what was written there, {_ATTEMPTS} times; see who else writes or deletes below "
            f"{store.uri}."
        )
    name, manifest, sha256 = found
    _point(store, name, sha256)
    _remove_unfinished(store)
    uri = store.child(f"{ARTIFACTS}/{name}").uri
    return PublishedArtifact(uri, sha256, len(manifest.files), sum(entry.bytes for entry in manifest.files))


def _manifest(description: ArtifactDescription, entries: tuple[FileEntry, ...]) -> ArtifactManifest:
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    made = ArtifactManifest.model_validate({**asdict(description), "files": entries, "created_at": now})
    return ArtifactManifest.model_validate_json(made.model_dump_json(by_alias=True))  # as it will be read


def _write(place: ObjectStore, files: Mapping[str, Path], manifest: ArtifactManifest) -> None:
    """All files, then the manifest."""
    for path, file in files.items():
        write_file(place, path, file)
    commit(place, "", manifest)


def _collect(directory: Path, extra: Mapping[str, Path]) -> dict[str, Path]:
    found = {file.relative_to(directory).as_posix(): file for file in directory.rglob("*") if file.is_file()}
    found |= extra
    if not found:
        raise StorageError(f"'{directory}' holds no file to publish; the trainer wrote nothing there.")
    if MANIFEST in found:
        raise StorageError(f"'{found[MANIFEST]}' cannot be published: the name {MANIFEST} is taken by the manifest.")
    return dict(sorted(found.items()))


def _digests(files: Mapping[str, Path]) -> dict[str, tuple[str, int]]:
    return {path: file_digest(file) for path, file in files.items()}


def _content_name(manifest: ArtifactManifest) -> str:
    """First 12 hex digits of a digest over all that the manifest says.

    That is the report and the time too: two launchers of one job never write into the same directory.
    """
    return hashlib.sha256(manifest.model_dump_json(by_alias=True).encode()).hexdigest()[:12]


def _first_whole(
    store: ObjectStore, wanted: ArtifactManifest, extra: Mapping[str, Path]
) -> tuple[str, ArtifactManifest, str] | None:
    """Directory, manifest and its sha256 of the whole artifact with the same content besides ``extra`` and the time.

    Of several the one pointed at, or else the first that was committed: launchers that publish at once all take it.
    """
    below = store.child(ARTIFACTS)
    committed = {info.path.partition("/")[0]: info.modified for info in below.list() if _is_manifest(info.path)}
    pointer = _pointer(store)
    pointed = pointer.directory if pointer else None
    for name in sorted(committed, key=lambda name: (f"{ARTIFACTS}/{name}" != pointed, committed[name], name)):
        try:
            manifest, sha256 = read_manifest(below, name, ArtifactManifest)
            if _same(manifest, wanted, extra):
                verify_bundle(below, name, manifest)
                return name, manifest, sha256
        except (ObjectNotFound, DamagedBundle):
            continue
    return None


def _same(found: ArtifactManifest, wanted: ArtifactManifest, extra: Mapping[str, Path]) -> bool:
    trained = [[entry for entry in one.files if entry.path not in extra] for one in (found, wanted)]
    described = found.model_copy(update={"files": wanted.files, "created_at": wanted.created_at})
    return trained[0] == trained[1] and described == wanted


def _is_manifest(path: str) -> bool:
    return path.partition("/")[2] == MANIFEST


def _pointer(store: ObjectStore) -> ArtifactPointer | None:
    try:
        return read_pointer(store)
    except DamagedBundle:
        return None


def _point(store: ObjectStore, name: str, sha256: str) -> None:
    directory = f"{ARTIFACTS}/{name}"
    pointer = _pointer(store)
    if pointer is None or (pointer.directory, pointer.manifest_sha256) != (directory, sha256):
        write_pointer(store, directory, sha256)


def _remove_unfinished(store: ObjectStore) -> None:
    """What killed publications left without a manifest; another launcher may still be filling a younger one."""
    infos = store.child(ARTIFACTS).list()
    committed = {info.path.partition("/")[0] for info in infos if _is_manifest(info.path)}
    newest: dict[str, datetime] = {}
    for info in infos:
        name, separator, _ = info.path.partition("/")
        if separator and name not in committed:
            newest[name] = max(info.modified, newest.get(name, info.modified))
    for name, modified in newest.items():
        if datetime.now(UTC) - modified > _ABANDONED_AFTER:
            delete_bundle(store, f"{ARTIFACTS}/{name}")
