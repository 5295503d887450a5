"""From the URIs of a spec to files on local disk."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from finetune_api.errors import DataError
from finetune_api.spec import Dataset, DataSource
from finetune_storage import ObjectStore, parse_uri, split_uri

SUFFIXES = (
    ".jsonl",
    ".json",
    ".ndjson",
    ".jsonl.gz",
    ".json.gz",
    ".jsonl.zst",
    ".json.zst",
    ".parquet",
    ".arrow",
    ".feather",
    ".ipc",
    ".csv",
    ".csv.gz",
    ".csv.zst",
)
_KNOWN = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .feather, .csv"
_WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One local file of a source. ``name`` is what messages and origins call it."""

    path: Path
    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """A source of the spec with its files, sorted by path."""

    place: str  # spec.dataset.train[0]
    spec: DataSource
    validation: bool
    files: tuple[SourceFile, ...]


def fetch_sources(dataset: Dataset, cache: Path) -> list[Source]:
    """Lists every source and brings its files onto local disk (``file://`` is read where it lies).

    Raises:
        DataError: a source has no file that can be read.
        StorageError, StorageUnavailable: object storage refused or did not answer.
    """
    named = [(f"spec.dataset.train[{i}]", source, False) for i, source in enumerate(dataset.train)]
    held_out = dataset.validation.sources if dataset.validation else ()
    named += [(f"spec.dataset.validation.sources[{i}]", source, True) for i, source in enumerate(held_out)]
    return [
        Source(place, source, validation, tuple(_fetch(place, source, cache))) for place, source, validation in named
    ]


def matches(path: str, pattern: str) -> bool:
    """Glob over ``/``-separated paths: ``*`` stays within a segment, ``**`` spans any number of them."""
    return _segments_match(path.split("/"), pattern.split("/"))


def _segments_match(path: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_segments_match(path[skip:], pattern[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _segments_match(path[1:], pattern[1:])


def _fetch(place: str, source: DataSource, cache: Path) -> list[SourceFile]:
    parent_uri, pattern = split_uri(source.uri)
    parent = parse_uri(parent_uri).local_path
    if parent is None:
        return _fetch_objects(place, source, cache)
    return [_described(path, name) for path, name in _find_local(place, source.uri, parent, pattern)]


def _find_local(place: str, uri: str, parent: Path, pattern: str) -> list[tuple[Path, str]]:
    if not _WILDCARDS.search(pattern):
        whole = parent / pattern
        if whole.is_file():
            _check_suffix(place, whole.name)
            return [(whole, whole.name)]
        if not whole.exists():
            raise DataError(f"{place}.uri: {uri} does not exist; correct the path")
        parent, pattern = whole, "**"
    candidates = parent.rglob("*") if "**" in pattern.split("/") else parent.glob(pattern)
    found = [path for path in candidates if path.is_file()]
    names = _select(place, uri, [path.relative_to(parent).as_posix() for path in found], pattern)
    return [(parent / name, name) for name in names]


def _fetch_objects(place: str, source: DataSource, cache: Path) -> list[SourceFile]:
    parent, pattern = split_uri(source.uri)
    store = ObjectStore.open_location(source, uri=parent)
    if not _WILDCARDS.search(pattern):
        if pattern and store.exists(pattern):
            _check_suffix(place, pattern)
        else:
            store, pattern = (store.child(pattern) if pattern else store), "**"
    infos = {info.path: info for info in store.list()} if _WILDCARDS.search(pattern) else {pattern: store.head(pattern)}
    names = _select(place, source.uri, list(infos), pattern)
    files = []
    for name in names:
        info = infos[name]
        identity = f"{store.join(name)}\n{info.bytes}\n{info.etag}\n{info.modified.isoformat()}"
        target = cache / "sources" / hashlib.sha256(identity.encode()).hexdigest()[:32] / Path(name).name
        if not target.exists():
            store.download(name, target)
        files.append(_described(target, name))
    return files


def _select(place: str, uri: str, paths: list[str], pattern: str) -> list[str]:
    """Paths that the pattern wants and that can be read; hidden files (``.x``, ``_SUCCESS``) are not data."""
    visible = [path for path in paths if not any(part.startswith((".", "_")) for part in path.split("/"))]
    wanted = sorted(path for path in visible if matches(path, pattern))
    readable = [path for path in wanted if path.lower().endswith(SUFFIXES)]
    if readable:
        return readable
    if wanted:
        named = ", ".join(wanted[:3]) + (" ..." if len(wanted) > 3 else "")
        raise DataError(f"{place}.uri: {uri} matches {named} but no data file; give files that end in {_KNOWN}")
    raise DataError(f"{place}.uri: {uri} matches no file; correct the path or the pattern")


def _check_suffix(place: str, name: str) -> None:
    if not name.lower().endswith(SUFFIXES):
        raise DataError(f"{place}.uri: {name} is not a known kind of data file; give files that end in {_KNOWN}")


def _described(path: Path, name: str) -> SourceFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(path, name, digest, path.stat().st_size)
