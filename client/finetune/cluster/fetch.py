"""``finetune fetch``: the published files in a folder, every digest checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.cluster.errors import ClusterError
from finetune.cluster.job import Job
from finetune.program import program


@dataclass(frozen=True)
class Fetched:
    directory: Path
    files: int
    bytes: int
    format: str


def fetch(job: Job, directory: Path, endpoint: str | None = None) -> Fetched:
    """Download the job's artifact with the credentials of this environment and verify all of it.

    The manifest must be the one that the training pod reported. ``endpoint`` stands in for ``spec.output.endpoint``
    where the cluster reaches the object storage by another address than this machine.

    Raises:
        ClusterError: nothing is published yet.
        StorageError: storage refuses, or the artifact is not what the job reported.
    """
    from finetune_storage import ObjectStore, fetch_artifact

    artifacts = job.status.artifacts
    if artifacts is None:
        raise ClusterError(
            f"the FineTuneJob '{job.name}' has published nothing; it is {job.state}",
            job.message if job.ended is not None else f"wait for it: {program()} wait {job.name}",
        )
    output = job.spec.get("output") or {}
    store = ObjectStore.open(
        artifacts.uri,
        endpoint=endpoint or output.get("endpoint"),
        region=output.get("region"),
        path_style=output.get("pathStyle"),
    )
    manifest = fetch_artifact(store, directory, manifest_sha256=artifacts.manifest_sha256)
    size = sum(entry.bytes for entry in manifest.files)
    return Fetched(directory, len(manifest.files), size, manifest.format)
