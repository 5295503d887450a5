"""One object store for s3, gs, az and local files: bounded retries, and errors that say what to mend."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import obstore
from obstore.store import LocalStore

from finetune_api.credentials import environment_of
from finetune_api.errors import StorageError, StorageUnavailable
from finetune_api.spec import ObjectLocation
from finetune_storage.connect import Access, AnyStore, connect
from finetune_storage.failures import Failure, Verdict, judge
from finetune_storage.uri import ObjectLocator, parse_uri

logger = logging.getLogger("finetune.storage")

DEFAULT_RETRY_SECONDS = 120.0
RETRY_SECONDS_VARIABLE = "FINETUNE_STORAGE_RETRY_SECONDS"
_MINIMUM_ATTEMPTS = 3
_LONGEST_PAUSE_SECONDS = 5.0
_PART_BYTES = 8 * 1024 * 1024
_MOST_PARTS = 9_000  # S3 allows 10,000
_READ_BYTES = 4 * 1024 * 1024
_NO_HARD_LINKS = re.compile(r"\(os error (?:1|38|95)\)")  # EPERM, ENOSYS, EOPNOTSUPP: a local create is a link
_NOT_IMPLEMENTED = re.compile(r"<Code>NotImplemented</Code>|\b501 Not Implemented\b")

T = TypeVar("T")


class ObjectNotFound(StorageError):
    """The object named in the message does not exist."""


class ConditionalWriteUnsupported(StorageError):
    """The store cannot write an object only if there is none by that name."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object. ``path`` is relative to the store it was listed from."""

    path: str
    bytes: int
    etag: str | None
    modified: datetime


@dataclass(frozen=True, repr=False)
class ObjectStore:
    """Objects under one URI prefix. Paths are relative to it, ``/``-separated, and name whole segments.

    A store may be shared between threads, not carried through ``fork``. Its text forms show the URI only.
    """

    locator: ObjectLocator  # path of the prefix, ends with "/" unless empty
    _backend: AnyStore
    _endpoint: str | None = None
    retry_seconds: float = DEFAULT_RETRY_SECONDS

    @classmethod
    def open(
        cls,
        uri: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
        environment: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
    ) -> ObjectStore:
        """Open the prefix ``uri``; nothing is sent yet.

        Credentials come from the standard environment variables, overlaid by ``environment``. A server that does not
        answer is tried again for ``retry_seconds`` (else ``FINETUNE_STORAGE_RETRY_SECONDS``, else 120).

        Raises:
            StorageError: the URI, the endpoint or a credential variable is malformed.
        """
        values = {**os.environ, **(environment or {})}
        return cls._open(uri, Access(endpoint, region, path_style), values, retry_seconds)

    @classmethod
    def open_location(
        cls,
        location: ObjectLocation,
        *,
        uri: str | None = None,
        environment: Mapping[str, str] | None = None,
        retry_seconds: float | None = None,
    ) -> ObjectStore:
        """Open the place a block of the spec names (``model``, a data source, ``output``), or ``uri`` as that block
        would be: with its endpoint, and in a cluster with its own Secret and no other.

        Raises:
            StorageError: as :meth:`open`.
        """
        uri = uri if uri is not None else location.uri  # type: ignore[attr-defined]
        values = environment_of(location, {**os.environ, **(environment or {})})
        wanted = Access(location.endpoint, location.region, location.path_style)
        return cls._open(uri, wanted, values, retry_seconds)

    @classmethod
    def _open(cls, uri: str, wanted: Access, values: Mapping[str, str], retry_seconds: float | None) -> ObjectStore:
        locator = parse_uri(uri)
        seconds = retry_seconds if retry_seconds is not None else _retry_seconds(values)
        bounded = replace(wanted, request_seconds=min(max(seconds, 10.0), 120.0))
        access = bounded.resolved(locator.scheme, values)
        backend = connect(locator, access, values)
        return cls(replace(locator, path=_as_prefix(locator.path)), backend, access.endpoint, seconds)

    @property
    def uri(self) -> str:
        """Canonical URI of the prefix; ends with ``/``."""
        return self.locator.uri

    @property
    def local_directory(self) -> Path | None:
        """The directory behind a ``file://`` or ``pvc://`` store, else ``None``."""
        return self.locator.local_path

    def __repr__(self) -> str:
        return f"ObjectStore({self.uri!r})"

    def child(self, prefix: str) -> ObjectStore:
        """The same store one level deeper."""
        return replace(self, locator=replace(self.locator, path=self.locator.path + _as_prefix(prefix)))

    def join(self, path: str) -> str:
        """URI of an object of this store."""
        return replace(self.locator, path=self.locator.path + path).uri

    def at(self, uri: str) -> ObjectStore:
        """Another prefix of the same bucket through the same connection.

        Raises:
            StorageError: ``uri`` lies in another bucket.
        """
        locator = parse_uri(uri)
        if (locator.scheme, locator.bucket) != (self.locator.scheme, self.locator.bucket):
            raise StorageError(f"'{locator.uri}' is not in the same bucket as '{self.uri}'; open it by itself.")
        return replace(self, locator=replace(locator, path=_as_prefix(locator.path)))

    def put(self, path: str, content: bytes | Path) -> None:
        """Write one object whole or not at all; large files go up in parts."""
        size = len(content) if isinstance(content, bytes) else _local_size(content)
        part_bytes = max(_PART_BYTES, -(-size // _MOST_PARTS))
        self._insist(
            "write",
            path,
            lambda: obstore.put(self._backend, self._key(path), content, chunk_size=part_bytes, max_concurrency=4),
        )

    def create(self, path: str, content: bytes) -> bool:
        """Write one small object unless there is one by that name; False where there is (or will be in a moment).

        Of several that call it at the same time one at most is told True. A call whose answer was lost is repeated, and
        may then be told False of its own object: read it to know whose it is.

        Raises:
            ConditionalWriteUnsupported: the store cannot do this, or overwrites without a word.
        """
        if not self._insist("create", path, lambda: self._create(path, content)):
            return False
        if self._insist("create", path, lambda: self._create(path, content)):  # only the second time tells
            raise ConditionalWriteUnsupported(
                f"Could not create {self.join(path)}: its store takes no notice of If-None-Match; use another one."
            )
        return True

    def _create(self, path: str, content: bytes) -> bool:
        try:
            obstore.put(self._backend, self._key(path), content, mode="create", use_multipart=False)
        except obstore.exceptions.AlreadyExistsError:
            return False
        except (obstore.exceptions.BaseError, OSError, NotImplementedError) as error:
            if (lack := self._lack_of_conditions(error)) is None:
                raise
            raise ConditionalWriteUnsupported(f"Could not create {self.join(path)}: {lack}.") from None
        return True

    def _lack_of_conditions(self, error: Exception) -> str | None:
        if self.local_directory is not None:
            told = _NO_HARD_LINKS.search(str(error)) is not None
            return "its file system has no hard links; use another one" if told else None
        told = isinstance(error, NotImplementedError | obstore.exceptions.NotSupportedError)
        if told or _NOT_IMPLEMENTED.search(str(error)):
            return "its store does not know If-None-Match; use another one"
        return None

    def get(self, path: str) -> bytes:
        """The content of one object, in memory.

        Raises:
            ObjectNotFound: there is no such object.
        """
        return b"".join(self.stream(path))

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive, cut at the object's end) of an object that has more than ``start``.

        Raises:
            ObjectNotFound: there is no such object.
            StorageError: it ends before ``start``.
        """
        if end <= start:
            return b""
        return self._insist(
            "read", path, lambda: bytes(obstore.get_range(self._backend, self._key(path), start=start, end=end))
        )

    def download(self, path: str, file: Path) -> None:
        """Copy one object to a local file, which appears only when it is complete."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as out:
                for chunk in self.stream(path):
                    out.write(chunk)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    def digest(self, path: str) -> tuple[str, int]:
        """sha256 (hex) and size of what is stored, by reading it back."""
        hasher, size = hashlib.sha256(), 0
        for chunk in self.stream(path):
            hasher.update(chunk)
            size += len(chunk)
        return hasher.hexdigest(), size

    def stream(self, path: str) -> Iterator[bytes]:
        """The object's bytes in chunks; a cut connection is taken up where it was cut, with a fresh budget."""
        position, etag = 0, None
        while True:
            result = self._insist("read", path, lambda: self._get_from(path, position, etag))  # noqa: B023
            etag = etag or result.meta.get("e_tag")
            total = result.meta["size"]
            if position == total:
                return
            try:
                for chunk in result.stream(min_chunk_size=_READ_BYTES):
                    data = bytes(chunk)
                    position += len(data)
                    yield data
            except (obstore.exceptions.BaseError, OSError, ValueError) as error:
                failure = self._judge(error)
                if failure.verdict is not Verdict.RETRY:
                    raise self._refusal("read", path, failure) from None
            if position >= total:
                return
            logger.warning("reading %s goes on at byte %d of %d", self.join(path), position, total)

    def _get_from(self, path: str, position: int, etag: str | None) -> obstore.GetResult:
        options: dict[str, object] = {}
        if position:
            options = {"range": {"offset": position}, **({"if_match": etag} if etag else {})}
        return obstore.get(self._backend, self._key(path), options=options)  # type: ignore[arg-type]

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Objects below ``prefix`` (whole path segments), sorted by path; an absent prefix is empty."""
        root = self.locator.path.lstrip("/")
        key = self._key(prefix.rstrip("/")) if prefix.rstrip("/") else root.rstrip("/")
        pages = self._insist("list", prefix, lambda: [*obstore.list(self._backend, key or None)])
        found = [
            ObjectInfo(meta["path"][len(root) :], meta["size"], meta.get("e_tag"), meta["last_modified"])
            for page in pages
            for meta in page
        ]
        return sorted(found, key=lambda info: info.path)

    def head(self, path: str) -> ObjectInfo:
        """Size, etag and time of one object.

        Raises:
            ObjectNotFound: there is no such object.
        """
        meta = self._insist("look up", path, lambda: self._head(path))
        return ObjectInfo(path, meta["size"], meta.get("e_tag"), meta["last_modified"])

    def _head(self, path: str) -> obstore.ObjectMeta:
        try:
            return obstore.head(self._backend, self._key(path))
        except FileNotFoundError:
            if isinstance(self._backend, LocalStore):
                raise
        # An answer to HEAD has no body, so an absent bucket looks like an absent object; GET tells them apart.
        return obstore.get(self._backend, self._key(path)).meta

    def exists(self, path: str) -> bool:
        """Whether the object exists."""
        try:
            self.head(path)
        except ObjectNotFound:
            return False
        return True

    def delete(self, path: str) -> None:
        """Remove one object; an absent one is no error. Directories left empty in a file system go too."""
        with suppress(ObjectNotFound):
            self._insist("delete", path, lambda: obstore.delete(self._backend, self._key(path)))
        if (directory := self.local_directory) is not None:
            _remove_empty_parents(directory, directory / path)

    def _key(self, path: str) -> str:
        if not path or path.startswith("/") or any(part in {"", ".", ".."} for part in path.split("/")):
            raise StorageError(f"'{path}' is no object path under {self.uri}; use names separated by single slashes.")
        return (self.locator.path + path).lstrip("/")

    def _judge(self, error: Exception) -> Failure:
        return judge(error, self.locator, self._endpoint)

    def _insist(self, verb: str, path: str, attempt: Callable[[], T]) -> T:
        """Run ``attempt`` until it succeeds, is refused, or the budget since the first failure is spent."""
        first_failure, tries = 0.0, 0
        while True:
            try:
                return attempt()
            except StorageError:
                raise
            except (obstore.exceptions.BaseError, OSError, ValueError) as error:
                failure = self._judge(error)
            tries += 1
            if failure.verdict is not Verdict.RETRY:
                raise self._refusal(verb, path, failure)
            now = time.monotonic()
            first_failure = first_failure or now
            if tries >= _MINIMUM_ATTEMPTS and now - first_failure >= self.retry_seconds:
                raise StorageUnavailable(
                    f"Could not {verb} {self._shown(path)}: {failure.reason}, tried {tries} times over "
                    f"{now - first_failure:.0f} s; {failure.remedy or 'try again'}."
                )
            pause = min(_LONGEST_PAUSE_SECONDS, 0.2 * 2**tries) * random.uniform(0.5, 1.0)
            logger.warning("could not %s %s: %s; trying again", verb, self._shown(path), failure.reason)
            time.sleep(pause)

    def _refusal(self, verb: str, path: str, failure: Failure) -> StorageError:
        kind = ObjectNotFound if failure.verdict is Verdict.ABSENT else StorageError
        remedy = f"; {failure.remedy}" if failure.remedy else ""
        return kind(f"Could not {verb} {self._shown(path)}: {failure.reason}{remedy}.")

    def _shown(self, path: str) -> str:
        return self.join(path) if path else self.uri


def _as_prefix(path: str) -> str:
    return path if not path or path.endswith("/") else path + "/"


def _retry_seconds(values: Mapping[str, str]) -> float:
    text = values.get(RETRY_SECONDS_VARIABLE, "")
    if not text:
        return DEFAULT_RETRY_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 86_400.0:
        raise StorageError(f"{RETRY_SECONDS_VARIABLE} is '{text}'; set it to seconds between 0 and 86400.")
    return seconds


def _local_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise StorageError(f"Local file '{file}' cannot be uploaded: {error.strerror}; check that it exists.") from None


def _remove_empty_parents(root: Path, file: Path) -> None:
    for directory in file.parents:
        if directory == root or root not in directory.parents:
            return
        try:
            directory.rmdir()
        except OSError:
            return
