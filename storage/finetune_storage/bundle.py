"""Bundles: files first, ``manifest.json`` last, everything read back.

A directory without a whole manifest does not exist.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.errors import StorageError
from finetune_api.fields import SchemaModel
from finetune_api.report import FileEntry
from finetune_storage.store import ObjectNotFound, ObjectStore

MANIFEST = "manifest.json"
_STAGING = ".finetune.partial"  # inside an empty destination; a killed fetch leaves it behind
_BLOCK_BYTES = 4 * 1024 * 1024
_ATTEMPTS = 3

M = TypeVar("M", bound=SchemaModel)


class DamagedBundle(StorageError):
    """A committed bundle whose content is not what its manifest says; ``problems`` has one sentence for each fault."""

    def __init__(self, uri: str, problems: Iterable[str]) -> None:
        self.uri = uri
        self.problems = tuple(problems)
        super().__init__(f"{uri} is damaged: {' '.join(self.problems)}")


def file_digest(file: Path) -> tuple[str, int]:
    """sha256 (hex) and size of a local file."""
    hasher, size = hashlib.sha256(), 0
    with file.open("rb") as source:
        while block := source.read(_BLOCK_BYTES):
            hasher.update(block)
            size += len(block)
    return hasher.hexdigest(), size


def write_file(store: ObjectStore, path: str, content: bytes | Path) -> FileEntry:
    """Upload one file and read it back.

    Raises:
        StorageError: what the store gives back differs from what was sent, three times.
    """
    expected = _digest_of(content)
    for _ in range(_ATTEMPTS):
        store.put(path, content)
        if store.digest(path) == expected:
            return FileEntry(path=path, sha256=expected[0], bytes=expected[1])
        if isinstance(content, Path):
            expected = _digest_of(content)
    raise StorageError(
        f"{store.join(path)} reads back differently from what was written, {_ATTEMPTS} times; "
        "check the disks behind this store."
    )


def commit(store: ObjectStore, prefix: str, manifest: SchemaModel) -> str:
    """Write the manifest of a bundle, which makes it exist; returns the manifest's sha256."""
    place = _below(store, prefix)
    text = manifest.model_dump_json(by_alias=True, indent=2) + "\n"
    sha256 = write_file(place, MANIFEST, text.encode()).sha256
    _remove_staging_files(place)
    return sha256


def read_manifest(store: ObjectStore, prefix: str, kind: type[M]) -> tuple[M, str]:
    """The manifest of a bundle and its sha256.

    Raises:
        ObjectNotFound: there is none, so the bundle does not exist.
        DamagedBundle: it is there but cannot be read.
    """
    manifest, content = _read_manifest(_below(store, prefix), kind)
    return manifest, hashlib.sha256(content).hexdigest()


def _read_manifest(place: ObjectStore, kind: type[M]) -> tuple[M, bytes]:
    content = place.get(MANIFEST)
    return parse_manifest(content, kind, place.uri), content


def parse_manifest(content: bytes, kind: type[M], uri: str) -> M:
    """The manifest of the bundle at ``uri``.

    Raises:
        DamagedBundle: it cannot be read.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise DamagedBundle(uri, [f"{MANIFEST} is not readable ({error.error_count()} faults)."]) from None


def files_of(manifest: SchemaModel) -> tuple[FileEntry, ...]:
    """The manifest's ``files``, with every path checked to stay inside the bundle."""
    entries: tuple[FileEntry, ...] = manifest.files  # type: ignore[attr-defined]
    for entry in entries:
        parts = PurePosixPath(entry.path).parts
        if not parts or entry.path.startswith("/") or ".." in parts or "\\" in entry.path:
            raise DamagedBundle("A manifest", [f"'{entry.path}' is not a path inside the bundle."])
    return entries


def verify_bundle(store: ObjectStore, prefix: str, manifest: SchemaModel) -> None:
    """Read every file of a bundle back and compare size and sha256.

    Raises:
        DamagedBundle: lists every file that differs.
    """
    place = _below(store, prefix)
    problems = [problem for entry in files_of(manifest) if (problem := _stored_problem(place, entry))]
    if problems:
        raise DamagedBundle(place.uri, problems)


def fetch_bundle(store: ObjectStore, prefix: str, kind: type[M], destination: Path) -> M:
    """Download a bundle into ``destination`` (replaced), which is filled only when every file is verified.

    An empty ``destination`` stays the directory that it is: it may be the current one, or a mount point.

    Raises:
        ObjectNotFound: there is no manifest.
        DamagedBundle: lists every file that is missing, truncated or altered.
    """
    place = _below(store, prefix)
    manifest, content = _read_manifest(place, kind)
    destination = Path(os.path.abspath(destination))
    staging = staging_directory(destination)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        problems = [problem for entry in files_of(manifest) if (problem := _fetch(place, entry, staging))]
        if problems:
            raise DamagedBundle(place.uri, problems)
        (staging / MANIFEST).write_bytes(content)
        _put_in_place(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def holds_files(directory: Path) -> bool:
    """Whether something lies in ``directory``, apart from what a killed fetch has left."""
    return any(entry.name != _STAGING for entry in directory.iterdir())


def staging_directory(destination: Path) -> Path:
    """Where a bundle grows before it is moved to ``destination`` (absolute), in the same file system."""
    if destination.is_dir() and not holds_files(destination):
        return destination / _STAGING
    return destination.with_name(f".{destination.name}.partial")


def _put_in_place(staging: Path, destination: Path) -> None:
    if staging.parent == destination:
        for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == MANIFEST):  # the manifest last
            entry.rename(destination / entry.name)
        return
    if destination.exists():
        shutil.rmtree(destination)
    staging.rename(destination)


def list_bundles(store: ObjectStore, prefix: str = "") -> list[str]:
    """Names of the directories right below ``prefix`` that hold a manifest, sorted."""
    return sorted(name for name, committed in bundle_names(store, prefix).items() if committed)


def bundle_names(store: ObjectStore, prefix: str = "") -> dict[str, bool]:
    """Directories right below ``prefix``: name to whether a manifest was committed."""
    place = _below(store, prefix)
    found: dict[str, bool] = {}
    for info in place.list():
        name, separator, rest = info.path.partition("/")
        if separator:
            found[name] = found.get(name, False) or rest == MANIFEST
    return found


def delete_bundle(store: ObjectStore, prefix: str) -> None:
    """Remove a bundle, its manifest first, so that a half-deleted one does not exist."""
    place = _below(store, prefix)
    place.delete(MANIFEST)
    for info in place.list():
        place.delete(info.path)
    if place.local_directory:
        shutil.rmtree(place.local_directory, ignore_errors=True)


def _remove_staging_files(place: ObjectStore) -> None:
    """Files that a killed writer left in a local directory; the library writes ``name#1`` and renames it."""
    if place.local_directory:
        for file in place.local_directory.rglob("*#*"):
            if file.name.rpartition("#")[2].isdigit():
                file.unlink(missing_ok=True)


def _digest_of(content: bytes | Path) -> tuple[str, int]:
    if isinstance(content, Path):
        return file_digest(content)
    return hashlib.sha256(content).hexdigest(), len(content)


def _below(store: ObjectStore, prefix: str) -> ObjectStore:
    return store.child(prefix) if prefix else store


def _stored_problem(place: ObjectStore, entry: FileEntry) -> str:
    try:
        sha256, size = place.digest(entry.path)
    except ObjectNotFound:
        return f"'{entry.path}' is missing."
    return _difference(entry, sha256, size)


def _fetch(place: ObjectStore, entry: FileEntry, directory: Path) -> str:
    try:
        place.download(entry.path, directory / entry.path)
    except ObjectNotFound:
        return f"'{entry.path}' is missing."
    return local_problem(directory, entry)


def local_problem(directory: Path, entry: FileEntry) -> str:
    """What is wrong with one file of a bundle in a local directory, or nothing."""
    file = directory / entry.path
    return _difference(entry, *file_digest(file)) if file.is_file() else f"'{entry.path}' is missing."


def _difference(entry: FileEntry, sha256: str, size: int) -> str:
    if size != entry.bytes:
        return f"'{entry.path}' has {size} bytes instead of {entry.bytes}."
    if sha256 != entry.sha256:
        return f"'{entry.path}' has sha256 {sha256[:12]}… instead of {entry.sha256[:12]}…."
    return ""
