"""Digests of what defines a training run."""

from __future__ import annotations

import hashlib
import json

from finetune_api.spec import FineTuneJobSpec

# These change how fast the same numbers are computed, never which.
_EXECUTION_ONLY = ("microBatchSize", "gradientCheckpointing")


def training_digest(spec: FineTuneJobSpec) -> str:
    """sha256 (hex) of what a checkpoint depends on: model, data, task, method, training; not the number of ranks.

    A field that is absent and one that equals its default give the same digest.
    """
    whole = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    parts = {key: whole[key] for key in ("model", "dataset", "task", "method", "training")}
    for key in _EXECUTION_ONLY:
        parts["training"].pop(key, None)
    for location in (parts["model"], *parts["dataset"]["train"]):
        location.pop("credentials", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
