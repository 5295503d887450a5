"""One object against the schema: every structural problem in plain words, and what can still be judged.

The validation library's own words never reach a user; this file is the only one that knows its error types.
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.errors import Problem
from finetune_api.fields import SchemaModel
from finetune_api.introspect import Path, bounds_of, class_at, enum_of, field_at, is_nullable, model_of, placed_names
from finetune_api.names import nearest
from finetune_api.sentences import example_of, pattern_sentence
from finetune_api.uris import uri_trouble, without_secrets
from finetune_api.yaml_reader import spell

Model = TypeVar("Model", bound=SchemaModel)
_SCALARS = {
    "int_type": ("must be a whole number", "write a number without quotes"),
    "int_parsing_size": ("is far too large a number", "write a smaller one"),
    "float_type": ("must be a number", "write a number without quotes"),
    "bool_type": ("must be true or false", "write true or false without quotes"),
    "string_type": ("must be text", "put it in quotes"),
    "model_type": ("must be a mapping of fields", "write its fields on indented lines below it"),
    "dict_type": ("must be a mapping of names to values", "write 'name: value' lines below it"),
    "tuple_type": ("must be a list", "write [ ] around it, or '- ' before every item"),
    "finite_number": ("must be a finite number", "write a number"),
}
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Structure(typing.Generic[Model]):
    """What came of reading an object. ``value`` holds defaults where something was broken or missing."""

    value: Model
    problems: tuple[Problem, ...]
    broken: frozenset[Path]  # relative to the object; rules that read these are not asked
    whole: bool


def read_structure(
    model: type[Model], data: Any, root: Path, line_of: Callable[[Path], int | None]
) -> Structure[Model]:
    """Judge ``data`` (plain JSON data) as a ``model``."""
    data, nulls = _without_nulls(model, _integral(copy.deepcopy(data)))
    problems = [
        Problem(
            spell(root + path), None, "is empty (null)", "give it a value, or remove the line", line_of(root + path)
        )
        for path in nulls
    ]
    broken = set(nulls)
    try:
        value = model.model_validate_json(json.dumps(data), strict=True, by_alias=True, by_name=False)
        return Structure(value, tuple(problems), frozenset(broken), not problems)
    except ValidationError as error:
        found = error.errors(include_url=False)
    for entry in found:
        location = tuple(part for part in entry["loc"] if part != "[key]")
        if location in broken or _is_echo(entry):
            continue
        problem = _problem(model, entry, location, root)
        broken.add(location)
        line = line_of(root + location)
        problems.append(Problem(spell(root + location), problem[0], problem[1], problem[2], line))
    pruned = _prune(data, broken)
    return Structure(_lenient(model, pruned), tuple(problems), frozenset(broken), False)


def _is_echo(entry: Mapping[str, Any]) -> bool:
    """A list counted as too short only because one of its items is broken."""
    context = entry.get("ctx") or {}
    return entry["type"] == "too_short" and len(entry["input"]) >= int(context["min_length"])


def _problem(model: type[SchemaModel], entry: Mapping[str, Any], location: Path, root: Path) -> tuple[Any, str, str]:
    """(value, rule, remedy) of one validation error."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx") or {}
    name = location[-1] if location else root[-1]
    if kind == "missing":
        return None, "is required and missing", f"add it, for example {example_of(location)}"
    if kind == "extra_forbidden":
        return None, "is not a known field", _unknown_remedy(model, location)
    if kind == "enum":
        choices = [member.value for member in _enumeration(model, location)]
        guess = nearest(value, choices) if isinstance(value, str) else None
        return value, f"must be one of {', '.join(choices)}", f"did you mean {guess}?" if guess else "use one of them"
    if name == "uri" and isinstance(value, str):
        trouble = uri_trouble(value, str(location[0]))
        rule, remedy = trouble or ("is not a usable URI", "check its spelling")
        return without_secrets(value), rule, remedy
    if kind in {"string_pattern_mismatch", "string_too_short", "string_too_long"}:
        return _text_problem(kind, value, context)
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return (
            value,
            f"must be {words} {bound:g}" if bound < 1e6 else f"must be {words} {bound:,.0f}",
            _within(model, location),
        )
    if kind in {"too_short", "too_long"}:
        limit = context.get("min_length", context.get("max_length"))
        words = "at least" if kind == "too_short" else "at most"
        noun = "item" if limit == 1 else "items"
        return None, f"must have {words} {limit} {noun}", "add one" if kind == "too_short" else "remove some"
    rule, remedy = _SCALARS.get(kind, ("is not valid here", "see the reference of this field"))
    if kind == "string_type" and isinstance(value, (dict, list)):
        remedy = "write plain text"
    if kind in {"int_type", "float_type", "bool_type"} and not isinstance(value, str):
        remedy = remedy.removesuffix(" without quotes")
    return (None if isinstance(value, (dict, list)) else value), rule, remedy


def _text_problem(kind: str, value: str, context: Mapping[str, Any]) -> tuple[str, str, str]:
    if kind == "string_pattern_mismatch":
        rule, remedy = pattern_sentence(context["pattern"])
        return without_secrets(value), rule, remedy
    if kind == "string_too_short":
        return value, "must not be empty" if context["min_length"] == 1 else "is too short", "write it out"
    return without_secrets(value), f"must have at most {context['max_length']} characters", "shorten it"


def _unknown_remedy(model: type[SchemaModel], location: Path) -> str:
    owner = class_at(model, location[:-1])
    known = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
    name = str(location[-1])
    guess = nearest(name, known)
    if guess:
        return f"did you mean {guess}?"
    elsewhere = placed_names(model).get(name)
    if elsewhere:
        return f"it belongs to spec.{elsewhere}"
    return f"remove it; known here are {', '.join(known)}"


def _within(model: type[SchemaModel], location: Path) -> str:
    """The whole range of a bounded number."""
    bounds = bounds_of(field) if (field := field_at(model, location)) else {}
    low = f"above {_number(bounds['gt'])}" if "gt" in bounds else f"from {_number(bounds.get('ge', 0))}"
    high = f"below {_number(bounds['lt'])}" if "lt" in bounds else f"up to {_number(bounds['le'])}"
    if "ge" in bounds and "le" in bounds:
        high = f"to {_number(bounds['le'])}"
    return f"use a number {low} {high}" if high.startswith("to ") else f"use a number {low} and {high}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _integral(data: Any) -> Any:
    """1e3 is the integer 1000, as JSON Schema and the API server see it."""
    if isinstance(data, dict):
        return {key: _integral(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_integral(value) for value in data]
    return int(data) if isinstance(data, float) and data.is_integer() and abs(data) < 2**53 else data


def _without_nulls(model: type[SchemaModel], data: Any) -> tuple[Any, list[Path]]:
    """The data without empty values, and where they stood."""
    found: list[Path] = []

    def walk(owner: type[SchemaModel] | None, node: Any, path: Path) -> None:
        if isinstance(node, list):
            for index, item in enumerate(node):
                walk(owner, item, (*path, index))
        if not isinstance(node, dict) or owner is None:
            return
        fields = {field.alias or name: field for name, field in owner.model_fields.items()}
        for key in list(node):
            field = fields.get(key)
            if node[key] is None and field is not None and not is_nullable(field):
                found.append((*path, key))
                del node[key]
            elif field is not None:
                walk(model_of(field.annotation), node[key], (*path, key))

    walk(model, data, ())
    return data, found


def _enumeration(model: type[SchemaModel], path: Path) -> list[Enum]:
    field = field_at(model, path)
    kind = enum_of(field.annotation) if field else None
    return list(kind) if kind else []


def _prune(data: Any, broken: set[Path]) -> Any:
    """The data without its broken values; list items are kept in place as ``None``."""
    for path in sorted(broken, key=len, reverse=True):
        node = data
        for part in path[:-1]:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                node = None
                break
        if isinstance(node, dict):
            node.pop(path[-1], None)
        elif isinstance(node, list) and path:
            node[int(path[-1])] = None
    return data if () not in broken else {}


def _lenient(model: type[Model], data: Any) -> Model:
    """An instance from data that is sound where present; what is required and absent becomes ``None`` or empty."""
    given = data if isinstance(data, dict) else {}
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        alias = field.alias or name
        if alias in given:
            values[name] = _lenient_value(field.annotation, given[alias])
        elif field.is_required():
            values[name] = _absent(field.annotation)
    return typing.cast(Model, model.model_construct(_fields_set=set(values), **values))


def _absent(annotation: Any) -> Any:
    owner = model_of(annotation)
    if typing.get_origin(annotation) is tuple:
        return ()
    return _lenient(owner, {}) if owner else None


def _lenient_value(annotation: Any, value: Any) -> Any:
    owner, kind = model_of(annotation), enum_of(annotation)
    if isinstance(value, list):
        kept = [item for item in value if item is not None]
        return tuple(_lenient(owner, item) if owner else item for item in kept)
    if owner is not None and isinstance(value, dict):
        return _lenient(owner, value)
    return kind(value) if kind is not None and value is not None else value
