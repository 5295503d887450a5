"""Defaults of training pods that Kubernetes takes, at the edges of its rules: chart and operator must take them too."""

from __future__ import annotations

from typing import Any

TAKEN: dict[str, Any] = {
    "labels": {"example.com/team": "ml", "empty": "", "n" * 63: "v" * 63},
    "annotations": {"Example.com/Note": "any text, at all"},
    "nodeSelector": {"topology.kubernetes.io/zone": "a-1_b.c"},
    "tolerations": [
        {"operator": "Exists"},
        {"key": "", "operator": "Exists", "value": ""},
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoExecute", "tolerationSeconds": 300},
        {"key": "spot", "operator": "Equal", "effect": "NoSchedule"},
    ],
}
