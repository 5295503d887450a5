"""Object storage for every room: URI to store, retries, bundles whose manifest is written last."""

from finetune_api.errors import StorageError, StorageUnavailable
from finetune_storage.artifact import fetch_artifact, find_artifact
from finetune_storage.bundle import (
    MANIFEST,
    DamagedBundle,
    bundle_names,
    commit,
    delete_bundle,
    fetch_bundle,
    file_digest,
    files_of,
    list_bundles,
    read_manifest,
    verify_bundle,
    write_file,
)
from finetune_storage.store import ObjectInfo, ObjectNotFound, ObjectStore
from finetune_storage.uri import ObjectLocator, parse_uri, split_uri

__all__ = [
    "MANIFEST",
    "DamagedBundle",
    "ObjectInfo",
    "ObjectLocator",
    "ObjectNotFound",
    "ObjectStore",
    "StorageError",
    "StorageUnavailable",
    "bundle_names",
    "commit",
    "delete_bundle",
    "fetch_artifact",
    "fetch_bundle",
    "file_digest",
    "files_of",
    "find_artifact",
    "list_bundles",
    "parse_uri",
    "read_manifest",
    "split_uri",
    "verify_bundle",
    "write_file",
]
