"""Words for patterns and for missing fields, so that nobody has to read a regular expression."""

from __future__ import annotations

from finetune_api.fields import ENDPOINT_PATTERN, QUANTITY_PATTERN
from finetune_api.introspect import Path

_COMMIT = r"^[0-9a-f]{40}$"
_PATTERNS: dict[str, tuple[str, str]] = {
    QUANTITY_PATTERN: ("must be a quantity", "write a number with a unit such as 16Gi, 500M or 2"),
    _COMMIT: ("must be a full commit", "write its 40 hexadecimal digits"),
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": (
        "must be a name of lower-case letters, digits and '-'",
        "rename it so that it starts and ends with a letter or digit",
    ),
    r"^[A-Za-z0-9_.*-]+$": (
        "must be a module name of letters, digits, '.', '_', '-' and '*'",
        "write it as the model spells it, such as q_proj",
    ),
    ENDPOINT_PATTERN: (
        "must be an http:// or https:// address without user information or query",
        "write it as http://host:port",
    ),
    r"^[a-z0-9-]+$": ("must be a region of lower-case letters, digits and '-'", "write it as in eu-central-1"),
    r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$": ("must be an extended resource", "write it as in nvidia.com/gpu"),
    r"^(Exists|Equal)$": ("must be one of Exists, Equal", "use one of them"),
    r"^(NoSchedule|PreferNoSchedule|NoExecute)$": (
        "must be one of NoSchedule, PreferNoSchedule, NoExecute",
        "use one of them",
    ),
}
_EXAMPLES: dict[tuple[str, ...], str] = {
    ("model",): "model: {uri: 's3://models/base/'}",
    ("model", "uri"): "uri: s3://models/base/",
    ("dataset",): "dataset: {train: [{uri: 's3://data/train.jsonl'}]}",
    ("dataset", "train"): "train: [{uri: 's3://data/train.jsonl'}]",
    ("method",): "method: {type: LoRA}",
    ("method", "type"): "type: LoRA",
    ("output",): "output: {uri: 's3://adapters/team'}",
    ("output", "uri"): "uri: s3://adapters/team",
    ("name",): "name: my-job",
}
_BY_NAME = {"uri": "uri: s3://data/train.jsonl", "secretName": "secretName: bucket"}


def pattern_sentence(pattern: str) -> tuple[str, str]:
    """(rule, remedy) for text that does not match ``pattern``."""
    return _PATTERNS.get(pattern, ("has a form that is not allowed", "see the reference of this field"))


def known_patterns() -> frozenset[str]:
    """Patterns that have words of their own."""
    return frozenset(_PATTERNS)


def example_of(path: Path) -> str:
    """What a missing field looks like when it is there."""
    names = tuple(part for part in path if isinstance(part, str))
    return _EXAMPLES.get(names) or _BY_NAME.get(names[-1] if names else "", f"{names[-1]}: ...")
