"""A schema class -> one JSON Schema without references: the common root of the CRD, the editor schema and the docs."""

from __future__ import annotations

from typing import Any

from finetune_api.deepspeed_options import PATH as DEEPSPEED_CONFIGURATION
from finetune_api.deepspeed_options import configuration_schema
from finetune_api.descriptions import DESCRIPTIONS
from finetune_api.fields import SchemaModel

_NOISE = frozenset({"title"})


def schema_of(model: type[SchemaModel], root: str) -> dict[str, Any]:
    """JSON Schema 2020-12 of ``model`` with every reference inlined.

    ``None`` shows as ``nullable: true`` only where null says something (a default that null switches off); an absent
    optional field is simply absent. ``root`` is the path under which ``DESCRIPTIONS`` knows the model.
    """
    raw = model.model_json_schema(by_alias=True, mode="validation")
    definitions = raw.pop("$defs", {})
    return _inline(raw, definitions, root)


def _inline(node: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    node = dict(node)
    if path == DEEPSPEED_CONFIGURATION:  # a dict in Python, a closed list of settings everywhere else
        node = configuration_schema()
    if "anyOf" in node:
        node = _without_null(node)
    reference = node.pop("$ref", None)
    if reference is not None:
        node = {**definitions[reference.rsplit("/", 1)[-1]], **node}
        return _inline(node, definitions, path)
    result = {key: value for key, value in node.items() if key not in _NOISE and key != "description"}
    if isinstance(result.get("default"), (dict, list)) or result.get("default", "") is None:
        del result["default"]
    if "properties" in node:
        result["properties"] = {
            name: _inline(member, definitions, f"{path}.{name}") for name, member in node["properties"].items()
        }
    if isinstance(node.get("items"), dict):
        result["items"] = _inline(node["items"], definitions, f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _inline(node["additionalProperties"], definitions, f"{path}[]")
    if "enum" in result:
        result["type"] = "string"
    description = DESCRIPTIONS.get(path)
    return {"description": description, **result} if description else result


def _without_null(node: dict[str, Any]) -> dict[str, Any]:
    """``anyOf: [X, null]`` -> X; nullable where the default is something else than null."""
    branches = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
    assert len(branches) == 1, "the schema uses unions of one type and null only"
    rest = {key: value for key, value in node.items() if key != "anyOf"}
    nullable = {"nullable": True} if node.get("default") is not None else {}
    return {**branches[0], **rest, **nullable}
