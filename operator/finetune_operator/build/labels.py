"""Names, labels, annotations and owners of the children."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api import API_GROUP, API_VERSION, KIND
from finetune_operator.build.inputs import Inputs
from finetune_operator.observe import JOB_LABEL

APPLICATION = {"app.kubernetes.io/name": "finetune-job", "app.kubernetes.io/managed-by": "finetune-operator"}
# Of a FineTuneJob's metadata; nothing else reaches its Job. Not a queue's labels: it would own spec.suspend as we do.
COPIED_PREFIXES = (f"{API_GROUP}/",)


def child_name(inputs: Inputs) -> str:
    """Name of the Job and of the Service: ``ftj-NAME``."""
    return f"ftj-{inputs.name}"


def labels(inputs: Inputs) -> dict[str, str]:
    """On every child and every pod."""
    return {**APPLICATION, JOB_LABEL: inputs.name}


def selector(inputs: Inputs) -> dict[str, str]:
    """What only the pods of this job match, in their namespace."""
    return {"app.kubernetes.io/name": APPLICATION["app.kubernetes.io/name"], JOB_LABEL: inputs.name}


def child_metadata(inputs: Inputs, name: str) -> dict[str, Any]:
    """Metadata of a child, with the FineTuneJob as its owner, so that it goes with it."""
    # blockOwnerDeletion stays unset: it would ask for rights on the owner's finalizers where that is enforced.
    owner = {
        "apiVersion": f"{API_GROUP}/{API_VERSION}",
        "kind": KIND,
        "name": inputs.name,
        "uid": inputs.uid,
        "controller": True,
    }
    return {"name": name, "namespace": inputs.namespace, "labels": labels(inputs), "ownerReferences": [owner]}


def copied(inputs: Inputs, field: str) -> dict[str, str]:
    """The ``labels`` or ``annotations`` of the FineTuneJob that its Job carries too."""
    return copied_from(inputs.resource["metadata"], field)


def copied_from(metadata: Mapping[str, Any], field: str) -> dict[str, str]:
    """The entries of ``metadata[field]`` under the prefixes that are handed on."""
    entries: Mapping[str, str] = metadata.get(field) or {}
    return {key: entries[key] for key in sorted(entries) if key.startswith(COPIED_PREFIXES)}
