"""``finetune fetch``: the published files in a folder, every digest checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cluster.errors import ClusterError
from finetune.cluster.job import COMPLETE, Job
from finetune.program import program
from finetune.result import Artifacts
from finetune_api.errors import FineTuneError
from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.trainer_config import JobIdentity
from finetune_api.validation import parse_spec

if TYPE_CHECKING:
    from finetune_storage import ObjectStore


@dataclass(frozen=True)
class Fetched:
    """What lies in ``directory`` now. ``confirmed``: the training pod itself reported the digest of the manifest."""

    directory: Path
    uri: str
    manifest_sha256: str
    files: int
    bytes: int
    format: str
    confirmed: bool

    @property
    def artifacts(self) -> Artifacts:
        """The same as a result tells it."""
        return Artifacts(uri=self.uri, manifest_sha256=self.manifest_sha256, files=self.files, bytes=self.bytes)


def fetch(job: Job, directory: Path, endpoint: str | None = None) -> Fetched:
    """Download the job's artifact with the credentials of this environment and verify all of it.

    The manifest must be the one that the training pod reported. Where the pod's last word was lost, it is the one
    that the job's own place in the object storage names. ``endpoint`` stands in for ``spec.output.endpoint`` where
    the cluster reaches the object storage by another address than this machine.

    Raises:
        ClusterError: nothing is published yet.
        StorageError: storage refuses, or the artifact is not what the job reported.
    """
    from finetune_storage import fetch_artifact

    reported = job.status.artifacts
    if reported is not None:
        store, sha256 = _open(job, reported.uri, endpoint), reported.manifest_sha256
    elif job.ended == COMPLETE:
        store, sha256 = _newest(_open(job, artifact_prefix(job), endpoint), job)
    else:
        raise ClusterError(
            f"the FineTuneJob '{job.name}' has published nothing; it is {job.state}",
            job.message if job.ended is not None else f"wait for it: {program()} wait {job.name}",
        )
    manifest = fetch_artifact(store, directory, manifest_sha256=sha256)
    size = sum(entry.bytes for entry in manifest.files)
    confirmed = reported is not None
    return Fetched(directory, store.uri, sha256, len(manifest.files), size, manifest.format, confirmed)


def artifact_prefix(job: Job) -> str:
    """Where the job publishes, as the operator planned it.

    Raises:
        ClusterError: the spec is of a version that this command does not understand.
    """
    identity = JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid)
    try:
        return make_plan(parse_spec(job.spec), Facts(), identity).artifact_prefix
    except FineTuneError as error:
        raise ClusterError(
            f"this version cannot tell where the FineTuneJob '{job.name}' has published ({error})",
            "use the finetune command of the operator's version",
        ) from error


def _open(job: Job, uri: str, endpoint: str | None) -> ObjectStore:
    from finetune_storage import ObjectStore

    output = job.spec.get("output") or {}
    return ObjectStore.open(
        uri,
        endpoint=endpoint or output.get("endpoint"),
        region=output.get("region"),
        path_style=output.get("pathStyle"),
    )


def _newest(store: ObjectStore, job: Job) -> tuple[ObjectStore, str]:
    """The artifact that the pointer below the job's prefix names, and the digest of its manifest."""
    from finetune_storage import ObjectNotFound, find_artifact

    try:
        place, _, sha256 = find_artifact(store)
    except ObjectNotFound as error:
        raise ClusterError(
            f"the FineTuneJob '{job.name}' is {job.state}, but nothing is published at {store.uri}", job.message
        ) from error
    return place, sha256
