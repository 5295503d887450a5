"""Where a training pod may read and write. Its root file system is read-only."""

from __future__ import annotations

from typing import Any

from finetune_api.spec_rules import locations
from finetune_api.uris import CLAIMS_DIRECTORY, claim_of
from finetune_operator.build.inputs import Inputs

CONFIG_DIRECTORY = "/etc/finetune"
WORK_DIRECTORY = "/work"
RUN_DIRECTORY = f"{WORK_DIRECTORY}/run"
CACHE_DIRECTORY = f"{WORK_DIRECTORY}/cache"
TEMPORARY_DIRECTORY = "/tmp"
_SHARED_MEMORY_DIRECTORY = "/dev/shm"


def build_volumes(inputs: Inputs, config_map_name: str) -> list[dict[str, Any]]:
    """The pod's volumes."""
    scratch = scratch_size(inputs)
    limit = {"sizeLimit": scratch} if scratch else {}
    shared = inputs.spec.resources.shared_memory or inputs.settings.pod_defaults.shared_memory
    return [
        {"name": "config", "configMap": {"name": config_map_name, "defaultMode": 0o444}},
        {"name": "tmp", "emptyDir": dict(limit)},
        {"name": "work", "emptyDir": dict(limit)},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
        *(
            {"name": _volume_name(number), "persistentVolumeClaim": _claim_source(claim, is_written)}
            for number, (claim, is_written) in enumerate(claims(inputs).items())
        ),
    ]


def build_mounts(inputs: Inputs) -> list[dict[str, Any]]:
    """The training container's mounts."""
    return [
        {"name": "config", "mountPath": CONFIG_DIRECTORY, "readOnly": True},
        {"name": "tmp", "mountPath": TEMPORARY_DIRECTORY},
        {"name": "work", "mountPath": WORK_DIRECTORY},
        {"name": "shm", "mountPath": _SHARED_MEMORY_DIRECTORY},
        *(
            {
                "name": _volume_name(number),
                "mountPath": f"{CLAIMS_DIRECTORY}/{claim}",
                **({} if is_written else {"readOnly": True}),
            }
            for number, (claim, is_written) in enumerate(claims(inputs).items())
        ),
    ]


def claims(inputs: Inputs) -> dict[str, bool]:
    """The PersistentVolumeClaims of the job's ``pvc://`` URIs, by name, and whether they are written to."""
    found: dict[str, bool] = {}
    for path, uri, _ in locations(inputs.spec):
        claim = claim_of(uri)
        if claim is not None:
            found[claim] = found.get(claim, False) or path == "spec.output"
    return dict(sorted(found.items()))


def scratch_size(inputs: Inputs) -> str | None:
    """Bound of each scratch volume; ``None``: the node's own."""
    return inputs.spec.resources.scratch or inputs.settings.pod_defaults.scratch


def _claim_source(claim: str, is_written: bool) -> dict[str, Any]:
    return {"claimName": claim, **({} if is_written else {"readOnly": True})}


def _volume_name(number: int) -> str:
    return f"claim-{number}"  # a claim's name may be longer than a volume's
