"""The CustomResourceDefinition: a structural schema with bounds, CEL rules, printer columns and a status."""

from __future__ import annotations

from typing import Any

from finetune_api import API_GROUP, API_VERSION, KIND, PLURAL
from finetune_api.cel import RULES
from finetune_api.schema_tree import schema_of
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

_COLUMNS: tuple[tuple[str, str, str, int], ...] = (  # name, type, path, priority
    ("State", "string", ".status.state", 0),
    ("Step", "integer", ".status.progress.step", 0),
    ("Total", "integer", ".status.plan.totalSteps", 0),
    ("Loss", "string", ".status.progress.loss", 0),
    ("ETA", "integer", ".status.progress.etaSeconds", 0),
    ("Method", "string", ".spec.method.type", 0),
    ("Nodes", "integer", ".status.plan.nodes", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Strategy", "string", ".status.plan.strategy", 1),
    ("Model", "string", ".spec.model.uri", 1),
    ("Artifact", "string", ".status.artifacts.uri", 1),
)
_KEPT = frozenset(
    {
        "description",
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "pattern",
        "format",
        "nullable",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "maxProperties",
    }
)


def custom_resource_definition() -> dict[str, Any]:
    """The whole manifest of the CRD."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{API_GROUP}"},
        "spec": {
            "group": API_GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": API_VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
                    "schema": {"openAPIV3Schema": _top()},
                }
            ],
        },
    }


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    column: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path}
    return {**column, "priority": priority} if priority else column


def _top() -> dict[str, Any]:
    conditions = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    status = _structural(schema_of(FineTuneJobStatus, "status"), "status")
    status["properties"]["conditions"].update(conditions)
    return {
        "description": "One fine-tuning run: a base model, a data set and a method become a verified artifact.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": _structural(schema_of(FineTuneJobSpec, "spec"), "spec"),
            "status": status,
        },
        "x-kubernetes-validations": list(RULES[""]),
    }


def _structural(node: dict[str, Any], path: str) -> dict[str, Any]:
    """JSON Schema -> the subset that the API server calls structural."""
    result = {key: value for key, value in node.items() if key in _KEPT}
    default = node.get("default")
    if default is not None and "description" in result:
        result["description"] += f" Default: {_spelled(default)}."
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            result |= {bound: node[exclusive], exclusive: True}
    if "properties" in node:
        result["properties"] = {n: _structural(m, f"{path}.{n}") for n, m in node["properties"].items()}
    if "items" in node:
        result["items"] = _structural(node["items"], f"{path}[]")
        result["x-kubernetes-list-type"] = "atomic"
    extra = node.get("additionalProperties")
    if isinstance(extra, dict):
        result["additionalProperties"] = _structural(extra, f"{path}[]")
    elif extra is True:
        result["x-kubernetes-preserve-unknown-fields"] = True
    if node.get("type") == "integer":
        result["format"] = "int64"
    if path in RULES:
        result["x-kubernetes-validations"] = list(RULES[path])
    return result


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
