"""The Indexed Job: one pod per node, replaced as often as the operator's budgets allow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_api.cel import CHANGED_WHILE_SUSPENDED
from finetune_api.exits import Cause, ExitClass
from finetune_operator.build.inputs import Inputs
from finetune_operator.build.labels import child_metadata, child_name
from finetune_operator.build.pod import build_pod_template
from finetune_operator.build.scheduling import scheduler_for
from finetune_operator.observe import PODS_DIGEST, PODS_GENERATION, TRAINER

# Kubernetes counts pods and knows no causes, so it never gives up: the operator does, by cause. The limit is per index
# because the pause before a replacement then doubles with the failures of that index, not of the whole gang.
_UNLIMITED = 2**31 - 1


def build_job(inputs: Inputs, config_map_name: str) -> dict[str, Any]:
    """The Job. Fields that are absent here are the API server's to set."""
    scheduler = scheduler_for(inputs)
    metadata = child_metadata(inputs, child_name(inputs))
    metadata["annotations"] = {
        PODS_DIGEST: pods_digest(inputs.resource["spec"]),
        PODS_GENERATION: str(inputs.resource["metadata"].get("generation", 0)),
    }
    for field, entries in scheduler.job_metadata(inputs).items():
        if entries:
            metadata[field] = {**entries, **metadata.get(field, {})}
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": inputs.plan.nodes,
        "parallelism": inputs.plan.nodes,
        "backoffLimitPerIndex": _UNLIMITED,
        "podReplacementPolicy": "Failed",  # never two pods with one rank
        "podFailurePolicy": {"rules": pod_failure_rules()},
        "template": build_pod_template(inputs, config_map_name),
        **scheduler.job_spec(inputs),
    }
    if inputs.spec.run_policy.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = inputs.spec.run_policy.active_deadline_seconds
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def pods_digest(spec: Mapping[str, Any]) -> str:
    """Of what may change between two lives of a job's pods, as its owner wrote it: 16 hex digits.

    Not of what is built from it: a new version of the operator restarts no pod.
    """
    blocks = {name: spec.get(name) for name in CHANGED_WHILE_SUSPENDED}
    return hashlib.sha256(json.dumps(blocks, sort_keys=True).encode()).hexdigest()[:16]


def pod_failure_rules() -> list[dict[str, Any]]:
    """First match wins: an eviction never counts; what only the user can mend ends the Job at once."""
    codes = sorted({exit_class.code for exit_class in ExitClass if exit_class.cause is Cause.USER})
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": TRAINER, "operator": "In", "values": codes}},
    ]
