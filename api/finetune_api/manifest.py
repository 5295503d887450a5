"""A manifest's text -> metadata and FineTuneJobSpec, or every problem at once with its line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from finetune_api import API_GROUP, API_VERSION, KIND
from finetune_api.digest import result_digest
from finetune_api.errors import Problem, SpecError
from finetune_api.fields import SchemaModel
from finetune_api.introspect import Path
from finetune_api.names import nearest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.structure import read_structure
from finetune_api.validation import Place, judge_spec, parse_spec
from finetune_api.yaml_reader import Document, read_yaml

__all__ = ["Document", "Metadata", "Place", "parse_manifest", "parse_spec", "read_manifest", "result_digest"]

API = f"{API_GROUP}/{API_VERSION}"
_TOP = ("apiVersion", "kind", "metadata", "spec")
_FROM_SERVER = frozenset({"uid", "resourceVersion", "generation", "creationTimestamp", "managedFields"}) | frozenset(
    {"finalizers", "ownerReferences", "generateName", "selfLink", "deletionTimestamp", "deletionGracePeriodSeconds"}
)
Label = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
Key = Annotated[str, Field(min_length=1, max_length=316)]


class Metadata(SchemaModel):
    """The part of Kubernetes' object metadata that a user writes."""

    name: Annotated[str, Field(min_length=1, max_length=50, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    namespace: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = (
        "default"
    )
    labels: Annotated[dict[Key, Label], Field(max_length=64)] = {}
    annotations: Annotated[dict[Key, Annotated[str, Field(max_length=262_144)]], Field(max_length=64)] = {}


def read_manifest(text: str | bytes, source: str = "manifest") -> Document:
    """The text as plain data with the line of every path.

    Raises:
        SpecError: text that is not one YAML 1.2 document, repeated fields, numbers that are not finite.
    """
    document = read_yaml(text, source)
    if document.problems:
        raise SpecError(document.problems)
    return document


def parse_manifest(
    text: str | bytes, source: str = "manifest", place: Place | None = None
) -> tuple[Metadata, FineTuneJobSpec]:
    """The job that a manifest describes.

    Raises:
        SpecError: every problem at once, in the order of the file.
    """
    document = read_yaml(text, source)
    problems = list(document.problems)
    data, lines = document.data, document.lines
    if not isinstance(data, dict):
        rule = "is empty" if data is None else "is not a mapping of fields"
        raise SpecError([Problem(source, None, rule, f"start it with 'apiVersion: {API}' and 'kind: {KIND}'")])
    problems += _top_problems(data, lines)
    metadata, metadata_problems = _metadata(data.get("metadata", {}), lines)
    spec, spec_problems = judge_spec(data.get("spec", {}), lines, place)
    unreadable = {problem.path for problem in problems}
    for field, found in (("metadata", metadata_problems), ("spec", spec_problems)):
        problems += [p for p in found if p.path not in unreadable] if field in data else []
    if problems:
        raise SpecError(sorted(problems, key=lambda problem: problem.line or 0))
    return metadata, spec


def _top_problems(data: dict[str, Any], lines: dict[Path, int]) -> list[Problem]:
    problems = []
    for field, expected in (("apiVersion", API), ("kind", KIND)):
        line = lines.get((field,))
        if field not in data:
            problems.append(Problem(field, None, "is required and missing", f"add {field}: {expected}"))
        elif data[field] != expected:
            problems.append(Problem(field, data[field], f"must be {expected}", f"write {field}: {expected}", line))
    for field in ("metadata", "spec"):
        if field not in data:
            remedy = (
                "add metadata: {name: my-job}"
                if field == "metadata"
                else "add spec with model, dataset, method and output"
            )
            problems.append(Problem(field, None, "is required and missing", remedy))
    for field in data:
        if field not in (*_TOP, "status"):
            guess = nearest(field, _TOP)
            remedy = f"did you mean {guess}?" if guess else _misplaced(field)
            problems.append(Problem(field, None, "is not a known field", remedy, lines.get((field,))))
    return problems


def _misplaced(field: str) -> str:
    inside = {name: f.alias or name for name, f in FineTuneJobSpec.model_fields.items()}.values()
    return "indent it below spec" if field in inside else f"remove it; known here are {', '.join(_TOP)}"


def _metadata(data: Any, lines: dict[Path, int]) -> tuple[Metadata, list[Problem]]:
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in _FROM_SERVER}
    structure = read_structure(
        Metadata, data, ("metadata",), lambda path: lines.get(path) or lines.get(path[:-1]) or lines.get(("metadata",))
    )
    return structure.value, list(structure.problems)
