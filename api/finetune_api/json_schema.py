"""JSON Schema (2020-12) of a whole manifest, for editors and as one of the judges in the tests."""

from __future__ import annotations

from typing import Any

from finetune_api import API_GROUP, API_VERSION, KIND
from finetune_api.manifest import Metadata
from finetune_api.schema_conditions import with_conditions
from finetune_api.schema_tree import schema_of
from finetune_api.spec import FineTuneJobSpec


def manifest_schema() -> dict[str, Any]:
    """What a FineTuneJob file may contain. Unknown fields are refused except in ``metadata``, as in a cluster."""
    metadata = schema_of(Metadata, "metadata")
    metadata["additionalProperties"] = True
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://{API_GROUP}/schemas/{API_VERSION}/{KIND.lower()}.json",
        "title": KIND,
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": f"{API_GROUP}/{API_VERSION}"},
            "kind": {"const": KIND},
            "metadata": metadata,
            "spec": with_conditions(_nulls(schema_of(FineTuneJobSpec, "spec")), "spec"),
            "status": {"type": "object"},
        },
    }


def _nulls(node: Any) -> Any:
    """``nullable`` in the words of JSON Schema."""
    if isinstance(node, list):
        return [_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _nulls(value) for key, value in node.items() if key != "nullable"}
    if node.get("nullable") is True:
        result["type"] = [node["type"], "null"]
    return result
