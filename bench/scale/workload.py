"""The jobs: FineTuneJobs for the operator, and the Jobs and Services that it would make of them for the bare client."""

from __future__ import annotations

import copy
from typing import Any

from bench.scale.client import Post
from finetune_api import API_GROUP, API_VERSION, KIND, PLURAL
from finetune_operator.build import build_children
from finetune_operator.reconcile import plan_of
from finetune_operator.settings import OperatorSettings

NODES_PER_JOB = 2
JOBS = "/apis/batch/v1/namespaces/{}/jobs"
PODS = "/api/v1/namespaces/{}/pods"
FINETUNEJOBS = f"/apis/{API_GROUP}/{API_VERSION}/namespaces/{{}}/{PLURAL}"
ALL_FINETUNEJOBS = f"/apis/{API_GROUP}/{API_VERSION}/{PLURAL}"
ALL_PODS = "/api/v1/pods"
CONFIG_MAPS = "/api/v1/namespaces/{}/configmaps"
SERVICES = "/api/v1/namespaces/{}/services"

# What people write: LoRA on two nodes with a GPU each.
_SPEC: dict[str, Any] = {
    "model": {"uri": "s3://models/base/", "credentials": {"secretName": "bucket"}},
    "dataset": {
        "train": [{"uri": "s3://datasets/support/*.jsonl", "credentials": {"secretName": "bucket"}}],
        "validation": {"fraction": 0.02},
        "maxSequenceLength": 4096,
    },
    "method": {"type": "LoRA", "lora": {"rank": 16}},
    "training": {"epochs": 3, "globalBatchSize": 64, "learningRate": 1e-4},
    "distributed": {"nodes": NODES_PER_JOB, "strategy": {"type": "FSDP"}},
    "resources": {"accelerator": {"count": 1}, "requests": {"cpu": "8", "memory": "64Gi"}},
    "output": {"uri": "s3://adapters/support", "credentials": {"secretName": "bucket"}},
}


def manifest(namespace: str, number: int, prefix: str = "job") -> dict[str, Any]:
    """One FineTuneJob."""
    metadata = {"namespace": namespace, "name": f"{prefix}-{number:05d}"}
    return {"apiVersion": f"{API_GROUP}/{API_VERSION}", "kind": KIND, "metadata": metadata, "spec": _SPEC}


def finetunejob(namespace: str, number: int, prefix: str = "job") -> Post:
    """The request that creates one."""
    return Post.of(FINETUNEJOBS.format(namespace), manifest(namespace, number, prefix))


def children(namespace: str, number: int, settings: OperatorSettings) -> tuple[Post, Post, Post]:
    """ConfigMap, Service and Job as the operator would make them, without an owner: there is none."""
    resource = copy.deepcopy(manifest(namespace, number))
    resource["metadata"]["uid"] = f"00000000-0000-4000-8000-{number:012d}"
    spec, plan = plan_of(resource, settings, is_new=True)
    made = build_children(resource, spec, plan, settings)
    for item in made.manifests:
        del item["metadata"]["ownerReferences"]
    return (
        Post.of(CONFIG_MAPS.format(namespace), made.config_map),
        Post.of(SERVICES.format(namespace), made.service),
        Post.of(JOBS.format(namespace), made.job),
    )
