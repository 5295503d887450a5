"""``finetune fetch``: the published files in a folder, every digest checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError, JobNotFound
from finetune.cluster.job import COMPLETE, Job
from finetune.program import program
from finetune.result import Artifacts
from finetune_api.errors import FineTuneError, StorageError
from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.trainer_config import JobIdentity
from finetune_api.uris import CLAIMS_DIRECTORY
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


def claim_elsewhere(uri: str) -> str:
    """The PersistentVolumeClaim that holds ``uri`` and is not mounted on this machine; empty for everything else."""
    from finetune_storage.uri import parse_uri

    locator = parse_uri(uri)
    if locator.scheme != "pvc":
        return ""
    try:
        return "" if locator.claim_directory else locator.bucket
    except StorageError:
        return locator.bucket


def check_directory(cluster: Cluster, name: str, directory: Path) -> None:
    """Refuse, before a job is created, a folder that its artifact could not be fetched to in the end.

    Of a job that has ended nothing is trained any more: the fetch knows whether the folder holds its very artifact.

    Raises:
        StorageError: the folder is not empty, or cannot be written.
    """
    from finetune_storage.artifact import check_destination

    hint = "name another with --directory, or leave the artifact where it is with --no-fetch"
    try:
        if not check_destination(directory):
            return
        trouble = StorageError(f"'{directory}' is not empty and the artifact of '{name}' is to go there", hint)
    except StorageError as error:
        trouble = error
    try:
        ended = cluster.job(name).ended
    except JobNotFound:
        ended = None
    if ended is None:
        raise trouble


def fetch(job: Job, directory: Path, endpoint: str | None = None) -> Fetched:
    """Download the job's artifact with the credentials of this environment and verify all of it.

    A folder that holds it already is verified and not downloaded again.

    The manifest must be the one that the training pod reported. Where the pod's last word was lost, it is the one
    that the job's own place in the object storage names. ``endpoint`` stands in for ``spec.output.endpoint`` where
    the cluster reaches the object storage by another address than this machine.

    Raises:
        ClusterError: nothing is published yet.
        StorageError: storage refuses, the artifact is not what the job reported, or the folder cannot take it.
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

    if claim := claim_elsewhere(uri):
        raise StorageError(
            f"the artifact lies in the PersistentVolumeClaim '{claim}' ({uri}), which is not mounted on this machine",
            f"run this in a pod that mounts it at {CLAIMS_DIRECTORY}/{claim}",
        )
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
