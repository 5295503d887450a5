"""Questions to the schema classes themselves, for everything that is generated from or told about them."""

from __future__ import annotations

import typing
from enum import Enum
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

from finetune_api.fields import SchemaModel

Path = tuple[str | int, ...]


def is_nullable(field: FieldInfo) -> bool:
    """Fields for which null says something: ``None`` is allowed and is not the default."""
    return type(None) in typing.get_args(field.annotation) and field.default is not None


def model_of(annotation: Any) -> type[SchemaModel] | None:
    """The schema class inside an annotation such as ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, SchemaModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = model_of(argument)
        if found is not None:
            return found
    return None


def class_at(model: type[SchemaModel], path: Path) -> type[SchemaModel] | None:
    """The schema class of the mapping at ``path`` below ``model``."""
    if not [part for part in path if isinstance(part, str)]:
        return model
    field = field_at(model, path)
    return model_of(field.annotation) if field else None


def field_at(model: type[SchemaModel], path: Path) -> FieldInfo | None:
    """The field at ``path`` below ``model``; list positions do not count."""
    owner: type[SchemaModel] | None = model
    field: FieldInfo | None = None
    for part in path:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in owner.model_fields.items()} if owner else {}
        field = fields.get(part)
        if field is None:
            return None
        owner = model_of(field.annotation)
    return field


def enum_of(annotation: Any) -> type[Enum] | None:
    """The enumeration inside an annotation such as ``E`` or ``E | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation
    return next((found for argument in typing.get_args(annotation) if (found := enum_of(argument))), None)


def bounds_of(field: FieldInfo) -> dict[str, Any]:
    """The numeric bounds of a field: gt, ge, lt, le."""
    found: dict[str, Any] = {}

    def collect(items: typing.Iterable[Any]) -> None:
        for item in items:
            if isinstance(item, FieldInfo):
                collect(item.metadata)
            for name in ("gt", "ge", "lt", "le"):
                value = getattr(item, name, None)
                if value is not None:
                    found[name] = value

    collect(field.metadata)
    for argument in typing.get_args(field.annotation):
        collect(getattr(argument, "__metadata__", ()))
    return found


@cache
def placed_names(model: type[SchemaModel]) -> dict[str, str]:
    """Every field name that occurs exactly once in the schema, and the block it belongs to."""
    places: dict[str, list[str]] = {}

    def walk(owner: type[SchemaModel], prefix: str) -> None:
        for name, field in owner.model_fields.items():
            alias = field.alias or name
            places.setdefault(alias, []).append(prefix)
            member = model_of(field.annotation)
            if member is not None:
                walk(member, f"{prefix}.{alias}" if prefix else alias)

    walk(model, "")
    return {name: blocks[0] for name, blocks in places.items() if len(blocks) == 1 and blocks[0]}
