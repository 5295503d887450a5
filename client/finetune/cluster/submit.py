"""From a manifest to a FineTuneJob in the cluster: judged here first, then created, never overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError, JobExists
from finetune.cluster.job import Job
from finetune.manifests import manifest_text
from finetune_api.digest import result_digest
from finetune_api.errors import FineTuneError, Problem, SpecError
from finetune_api.manifest import Place, parse_manifest, parse_spec, read_manifest
from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity


@dataclass(frozen=True)
class Submission:
    """A manifest that is valid for a cluster. ``namespace`` is ``None`` where the manifest names none."""

    source: str
    manifest: Mapping[str, Any]
    spec: FineTuneJobSpec
    name: str
    namespace: str | None


@dataclass(frozen=True)
class Submitted:
    """The job in the cluster. ``created`` is false where the same job was there before."""

    job: Job
    created: bool
    differing: tuple[str, ...] = ()  # blocks of the spec that may differ without changing the result, and do


def read_submission(path: str) -> Submission:
    """Read, judge for a cluster and plan without facts.

    Raises:
        SpecError: every problem at once.
    """
    text = manifest_text(path)
    metadata, spec = parse_manifest(text, source=path, place=Place.CLUSTER)
    make_plan(spec, Facts(), JobIdentity(namespace=metadata.namespace, name=metadata.name, uid="0" * 16))
    manifest = read_manifest(text, path).data
    namespace = manifest["metadata"].get("namespace")
    kept = {field: manifest[field] for field in ("apiVersion", "kind", "metadata", "spec")}
    return Submission(path, kept, spec, metadata.name, str(namespace) if namespace else None)


def settle_namespace(submission: Submission, cluster: Cluster, asked: str | None) -> str:
    """The manifest's namespace wins over the context's; two that contradict each other are refused (as kubectl).

    Raises:
        SpecError: ``--namespace`` and the manifest differ.
    """
    written = submission.namespace
    if written and asked and written != asked:
        remedy = f"drop --namespace {asked}, or remove the field"
        raise SpecError([Problem("metadata.namespace", written, "is not the namespace of the command line", remedy)])
    return written or asked or cluster.namespace


def submit(cluster: Cluster, submission: Submission) -> Submitted:
    """Create the job in ``cluster.namespace``; the same job that is there already is left alone.

    Raises:
        JobExists: a job of this name has another result.
    """
    manifest = dict(submission.manifest)
    manifest["metadata"] = {**manifest["metadata"], "namespace": cluster.namespace}
    try:
        return Submitted(cluster.create(manifest), created=True)
    except JobExists:
        return _existing(cluster, submission)


def _existing(cluster: Cluster, submission: Submission) -> Submitted:
    job = cluster.job(submission.name)
    try:
        there = parse_spec(job.spec)
    except FineTuneError as error:
        raise ClusterError(
            f"a FineTuneJob '{job.name}' exists in the namespace '{job.namespace}' and this version cannot read it"
            f" ({error})",
            "choose another metadata.name",
        ) from error
    if result_digest(there) != result_digest(submission.spec):
        raise JobExists(
            f"another FineTuneJob '{job.name}' exists in the namespace '{job.namespace}' ({job.state}), with another"
            f" {_blocks(there, submission.spec)}",
            "choose another metadata.name, or delete that job first",
        )
    fields = [name for name in type(there).model_fields if getattr(there, name) != getattr(submission.spec, name)]
    return Submitted(job, created=False, differing=tuple(_spelled(there, name) for name in fields))


def _blocks(left: FineTuneJobSpec, right: FineTuneJobSpec) -> str:
    """The blocks that define the result and differ: ``model``, ``model and training``."""
    defining = ("model", "dataset", "task", "method", "training", "distributed", "resources", "output")
    names = [f"spec.{name}" for name in defining if getattr(left, name) != getattr(right, name)]
    return " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + f" and {names[-1]}"


def _spelled(spec: FineTuneJobSpec, name: str) -> str:
    return f"spec.{type(spec).model_fields[name].alias or name}"
