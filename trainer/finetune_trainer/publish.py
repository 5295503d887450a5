"""Publication: the artifact's files into an immutable directory named by their content, its manifest last.

A kill at any byte leaves the old artifact or the new one: files first, then ``manifest.json``, then one atomic
write of ``latest.json``. Publishing the same thing again finds it there, verifies it and changes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.errors import StorageError
from finetune_api.report import ArtifactManifest, FileEntry
from finetune_storage import (
    MANIFEST,
    DamagedBundle,
    ObjectNotFound,
    ObjectStore,
    bundle_names,
    commit,
    delete_bundle,
    file_digest,
    read_manifest,
    verify_bundle,
    write_file,
)
from finetune_storage.artifact import ARTIFACTS, read_pointer, write_pointer

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
    trained = tuple(entry for entry in entries if entry.path not in (extra or {}))
    name = _content_name(trained, description)
    place = store.child(f"{ARTIFACTS}/{name}")
    manifest, sha256 = _published_already(place, trained) or _write(place, files, entries, description)
    _point(store, name, sha256)
    _remove_unfinished(store, name)
    return PublishedArtifact(place.uri, sha256, len(manifest.files), sum(entry.bytes for entry in manifest.files))


def _write(
    place: ObjectStore, files: Mapping[str, Path], entries: tuple[FileEntry, ...], description: ArtifactDescription
) -> tuple[ArtifactManifest, str]:
    """All files, then the manifest; its sha256 too."""
    for path, file in files.items():
        write_file(place, path, file)
    manifest = ArtifactManifest.model_validate(
        {**asdict(description), "files": entries, "created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    return manifest, commit(place, "", manifest)


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


def _content_name(entries: tuple[FileEntry, ...], description: ArtifactDescription) -> str:
    """First 12 hex digits of a digest over what was trained (not the report on it) and the description."""
    content = {"files": [entry.model_dump() for entry in entries], "description": asdict(description)}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _published_already(place: ObjectStore, trained: tuple[FileEntry, ...]) -> tuple[ArtifactManifest, str] | None:
    """Manifest and its sha256 where the same artifact lies whole; ``None`` where it must be written (again)."""
    try:
        manifest, sha256 = read_manifest(place, "", ArtifactManifest)
        if any(entry not in manifest.files for entry in trained):
            return None
        verify_bundle(place, "", manifest)
    except (ObjectNotFound, DamagedBundle):
        return None
    return manifest, sha256


def _point(store: ObjectStore, name: str, sha256: str) -> None:
    directory = f"{ARTIFACTS}/{name}"
    try:
        pointer = read_pointer(store)
    except DamagedBundle:
        pointer = None
    if pointer is None or (pointer.directory, pointer.manifest_sha256) != (directory, sha256):
        write_pointer(store, directory, sha256)


def _remove_unfinished(store: ObjectStore, name: str) -> None:
    """Directories that a killed publication left without a manifest; the prefix belongs to this job alone."""
    for other, committed in bundle_names(store, ARTIFACTS).items():
        if not committed and other != name:
            delete_bundle(store, f"{ARTIFACTS}/{other}")
