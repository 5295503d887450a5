"""The pod that trains: one launcher as process 1, nothing that `restricted` Pod Security forbids."""

from __future__ import annotations

from typing import Any

from finetune_operator.build.config_map import KEY, TERMINATION_MESSAGE_PATH
from finetune_operator.build.environment import build_environment, build_secret_sources
from finetune_operator.build.inputs import Inputs
from finetune_operator.build.labels import child_name, labels
from finetune_operator.build.scheduling import scheduler_for
from finetune_operator.build.service import METRICS_PORT, RENDEZVOUS_PORT
from finetune_operator.build.volumes import CONFIG_DIRECTORY, build_mounts, build_volumes
from finetune_operator.observe import TRAINER

USER = 65532
COMMAND = ("python", "-m", "finetune_trainer", "--config", f"{CONFIG_DIRECTORY}/{KEY}")


def build_pod_template(inputs: Inputs, config_map_name: str) -> dict[str, Any]:
    """The Job's pod template."""
    defaults = inputs.settings.pod_defaults
    metadata: dict[str, Any] = {"labels": {**defaults.labels, **labels(inputs)}}
    if defaults.annotations:
        metadata["annotations"] = dict(defaults.annotations)
    spec: dict[str, Any] = {
        "subdomain": child_name(inputs),
        "restartPolicy": "Never",  # the Job replaces pods: a replacement may go to another node
        "terminationGracePeriodSeconds": defaults.termination_grace_period_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # a large volume is not walked at every start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(inputs)],
        "volumes": build_volumes(inputs, config_map_name),
        **scheduler_for(inputs).pod_spec(inputs),
    }
    if inputs.settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in inputs.settings.image_pull_secrets]
    return {"metadata": metadata, "spec": spec}


def _container(inputs: Inputs) -> dict[str, Any]:
    settings = inputs.settings
    container: dict[str, Any] = {
        "name": TRAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.trainer_image_pull_policy.value,
        "command": list(COMMAND),
        "env": build_environment(inputs),
        "ports": [
            {"name": "rendezvous", "containerPort": RENDEZVOUS_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        # Ready: the launcher answers and watches its ranks. There is no liveness probe on purpose: it would kill
        # outside of the operator's budgets, with an exit code that cannot be told from running out of memory.
        "readinessProbe": {
            "httpGet": {"path": "/healthz", "port": "metrics"},
            "periodSeconds": 2,
            "timeoutSeconds": 5,
            "failureThreshold": 5,
        },
        "resources": build_resources(inputs),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": TERMINATION_MESSAGE_PATH,
        "terminationMessagePolicy": "File",
        "volumeMounts": build_mounts(inputs),
    }
    if sources := build_secret_sources(inputs):
        container["envFrom"] = sources
    return container


def build_resources(inputs: Inputs) -> dict[str, dict[str, str]]:
    """``requests`` and ``limits`` of the training container."""
    asked = inputs.spec.resources
    requests = asked.requests.model_dump(exclude_none=True)
    limits = asked.limits.model_dump(exclude_none=True)
    if asked.scratch:
        requests["ephemeral-storage"] = asked.scratch  # a node with room for it
    if asked.accelerator:  # an extended resource is never overcommitted: both are equal
        limits[asked.accelerator.resource_name] = requests[asked.accelerator.resource_name] = str(
            asked.accelerator.count
        )
    return {name: amounts for name, amounts in (("requests", requests), ("limits", limits)) if amounts}
