"""The training container's variables: plain words, and references to Secrets that only kubelet resolves."""

from __future__ import annotations

from typing import Any

from finetune_api.credentials import ENDPOINT_VARIABLES, VARIABLES, variable_prefix
from finetune_api.quantities import quantity_value
from finetune_api.spec_rules import locations
from finetune_operator.build.inputs import Inputs
from finetune_operator.build.volumes import CACHE_DIRECTORY, TEMPORARY_DIRECTORY

_USER = "finetune"
_FROM_POD = {"NODE_NAME": "spec.nodeName", "POD_IP": "status.podIP", "POD_NAME": "metadata.name"}


def build_environment(inputs: Inputs) -> list[dict[str, Any]]:
    """``env``, sorted by name; the administrator's values win over ours."""
    entries: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in _values(inputs).items()}
    for name, (secret, key) in _shared_secrets(inputs).items():
        reference = {"name": secret, "key": key, "optional": True}  # which keys a Secret has is its owner's choice
        entries[name] = {"valueFrom": {"secretKeyRef": reference}}
    entries |= {name: {"value": ""} for name in _withheld(inputs)}
    if inputs.spec.model.uri.startswith("hf://") and inputs.spec.model.endpoint:
        # Escaped: kubelet would put the value of another variable, a credential perhaps, in the place of "$(NAME)".
        entries["HF_ENDPOINT"] = {"value": inputs.spec.model.endpoint.replace("$(", "$$(")}
    for name, path in _FROM_POD.items():
        entries[name] = {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}
    entries |= {name: {"value": value} for name, value in inputs.settings.pod_defaults.environment.items()}
    return [{"name": name, **entries[name]} for name in sorted(entries)]


def build_secret_sources(inputs: Inputs) -> list[dict[str, Any]]:
    """``envFrom``: each Secret under its own prefix, so that two never mix and none sets a variable of Python or libc.

    They are not optional: a pod whose Secret is missing waits, and says which one.
    """
    return [{"prefix": variable_prefix(name), "secretRef": {"name": name}} for name in secret_names(inputs)]


def secret_names(inputs: Inputs) -> list[str]:
    """The Secrets that the job names, sorted."""
    return sorted({block.credentials.secret_name for _, _, block in locations(inputs.spec) if block.credentials})


def _shared_secrets(inputs: Inputs) -> dict[str, tuple[str, str]]:
    """Variable -> (Secret, key), for locations that name no Secret, and for the hub's own library.

    They share the Secret of the output, else of the model, else of the data; one of the same scheme comes first.
    """
    blocks = sorted(locations(inputs.spec), key=lambda found: found[0] != "spec.output")
    places = [(uri.partition("://")[0], block.credentials) for _, uri, block in blocks]
    named = [(scheme, credentials.secret_name) for scheme, credentials in places if credentials]
    shared: dict[str, tuple[str, str]] = {}
    for scheme in sorted({scheme for scheme, credentials in places if credentials is None or scheme == "hf"}):
        secret = next((name for other, name in named if other == scheme), named[0][1] if named else None)
        if secret is not None:
            prefix = "" if scheme == "hf" else variable_prefix()
            shared |= {prefix + key: (secret, key) for key in VARIABLES.get(scheme, ())}
    if inputs.settings.uris.endpoints:
        return {name: source for name, source in shared.items() if source[1] not in ENDPOINT_VARIABLES}
    return shared


def _withheld(inputs: Inputs) -> list[str]:
    """Variables set to nothing, which wins over ``envFrom``: where endpoints are listed, no Secret may name another."""
    if not inputs.settings.uris.endpoints:
        return []
    return [variable_prefix(secret) + name for secret in secret_names(inputs) for name in ENDPOINT_VARIABLES]


def _values(inputs: Inputs) -> dict[str, str]:
    values = {
        "HF_HOME": f"{CACHE_DIRECTORY}/huggingface",
        "HOME": TEMPORARY_DIRECTORY,
        "LOGNAME": _USER,  # libraries ask who they are, and an arbitrary user has no entry in /etc/passwd
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": TEMPORARY_DIRECTORY,
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": f"{TEMPORARY_DIRECTORY}/torchinductor",
        "TRITON_CACHE_DIR": f"{TEMPORARY_DIRECTORY}/triton",
        "USER": _USER,
    }
    if not inputs.spec.model.uri.startswith("hf://"):
        values["HF_HUB_OFFLINE"] = "1"
    if inputs.plan.device == "cpu":
        values["DS_ACCELERATOR"] = "cpu"
    threads = threads_per_rank(inputs)
    if threads is not None:
        values["OMP_NUM_THREADS"] = str(threads)
    return values


def threads_per_rank(inputs: Inputs) -> int | None:
    """The pod's processors dealt to its ranks; ``None`` where the job names no number: the trainer asks the kernel."""
    resources = inputs.spec.resources
    cpu = resources.limits.cpu or resources.requests.cpu
    return None if cpu is None else max(1, int(quantity_value(cpu)) // inputs.plan.processes_per_node)
