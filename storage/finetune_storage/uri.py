"""Object URIs: ``s3://bucket/path``, ``gs://bucket/path``, ``az://container/path``, ``file:///path``, ``pvc://claim/path``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from finetune_api.errors import StorageError
from finetune_api.uris import CLAIMS_DIRECTORY, is_bucket_name, is_claim_name

SCHEMES = ("file", "s3", "gs", "az")
CLAIMS_VARIABLE = "FINETUNE_CLAIMS_DIRECTORY"  # where PersistentVolumeClaims are mounted, if not at /mnt/pvc
_WILDCARDS = "*?["
_UNQUOTED = "/~!$&'()*+,;=:@[]?"


@dataclass(frozen=True)
class ObjectLocator:
    """A parsed URI. ``bucket`` is empty for ``file``, whose ``path`` is absolute; other paths have no leading slash.

    For ``pvc``, ``bucket`` is the PersistentVolumeClaim.
    """

    scheme: str
    bucket: str
    path: str

    @property
    def uri(self) -> str:
        """The canonical spelling; a path of a file system is percent-encoded where it must be."""
        if self.scheme == "file":
            return "file://" + quote(self.path, safe=_UNQUOTED)
        path = quote(self.path, safe=_UNQUOTED) if self.scheme == "pvc" else self.path
        return f"{self.scheme}://{self.bucket}/{path}"

    @property
    def local_path(self) -> Path | None:
        """Where it lies in this machine's file system; ``None`` for a bucket.

        Raises:
            StorageError: the PersistentVolumeClaim is not mounted here.
        """
        if self.scheme == "file":
            return Path(self.path)
        return self.claim_directory / self.path if self.scheme == "pvc" else None

    @property
    def claim_directory(self) -> Path:
        """Where the claim of a ``pvc`` URI is mounted.

        Raises:
            StorageError: it is not.
        """
        root = Path(os.environ.get(CLAIMS_VARIABLE) or CLAIMS_DIRECTORY)
        if not root.is_dir():
            raise StorageError(_NO_CLUSTER)
        if not (root / self.bucket).is_dir():
            raise StorageError(
                f"The PersistentVolumeClaim '{self.bucket}' is not mounted here; correct {self.uri}, "
                f"or mount the claim at {root / self.bucket}."
            )
        return root / self.bucket


def parse_uri(uri: str) -> ObjectLocator:
    """Take a URI apart. User info and query strings are refused without being repeated, for they may hold secrets."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in {*SCHEMES, "pvc"}:
        raise StorageError(_unknown_scheme(scheme if separator else ""))
    authority, slash, path = rest.partition("/")
    if "@" in authority:
        raise StorageError(
            f"A {scheme}:// URI holds user information before '@'; credentials belong in environment variables, "
            "remove them from the URI."
        )
    if scheme == "file":
        return _parse_file(uri, authority, slash + path)
    if "=" in rest.partition("?")[2]:  # without '=' it is a wildcard
        raise StorageError(
            f"A {scheme}:// URI holds a query string after '?'; remove it, "
            "credentials and signatures belong in environment variables."
        )
    if not authority:
        named, example = ("claim", "CLAIM") if scheme == "pvc" else ("bucket", "BUCKET")
        raise StorageError(f"'{uri}' names no {named}; write {scheme}://{example}/PATH.")
    if scheme == "pvc":
        if not is_claim_name(authority):
            raise StorageError(
                f"'{authority}' in '{uri}' is no name of a PersistentVolumeClaim; write pvc://CLAIM/PATH."
            )
        path = unquote(path)
    elif not is_bucket_name(authority):  # it becomes a part of a host name
        raise StorageError(
            f"A {scheme}:// URI names a bucket that cannot exist; use letters, digits, '.', '_' and '-' after a letter "
            "or digit."
        )
    if any(part in {".", ".."} for part in path.split("/")):
        raise StorageError(f"'{uri}' contains '.' or '..'; write the path out.")
    return ObjectLocator(scheme, authority, path)


def _parse_file(uri: str, authority: str, path: str) -> ObjectLocator:
    if authority not in {"", "localhost"} or not path:
        raise StorageError(f"'{uri}' is not absolute; write file:///ABSOLUTE/PATH with three slashes.")
    path = unquote(path)
    trailing = "/" if path.endswith("/") and path != "/" else ""
    return ObjectLocator("file", "", os.path.normpath(path) + trailing)


_NO_CLUSTER = "A pvc:// URI names a volume of the cluster; use file://, s3://, gs:// or az:// outside of one."


def _unknown_scheme(scheme: str) -> str:
    if scheme == "hf":
        return (
            "An hf:// URI can only name a base model to read; use file://, s3://, gs:// or az:// for data and output."
        )
    named = f"scheme '{scheme}'" if scheme else "no scheme"
    return f"A storage URI has {named}; write one of {', '.join(name + '://' for name in SCHEMES)}."


def split_uri(uri: str) -> tuple[str, str]:
    """Parent URI (ends with ``/``) and the rest: ``s3://b/data/*.jsonl`` -> ``("s3://b/data/", "*.jsonl")``.

    The parent ends before the first segment with a wildcard, so that listing the parent finds every match.
    """
    locator = parse_uri(uri)
    segments = locator.path.split("/")
    cut = next((i for i, part in enumerate(segments) if any(c in part for c in _WILDCARDS)), len(segments) - 1)
    parent = "/".join(segments[:cut])
    parent = parent + "/" if parent or locator.scheme == "file" else ""
    return ObjectLocator(locator.scheme, locator.bucket, parent).uri, "/".join(segments[cut:])
