"""Every example is accepted by the parser and by the JSON Schema, and can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from finetune.manifests import resolve_relative_uris
from finetune_api import KIND
from finetune_api.json_schema import manifest_schema
from finetune_api.manifest import parse_manifest, read_manifest
from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.trainer_config import JobIdentity

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted(
    path for path in (ROOT / "examples").rglob("*.yaml") if f"kind: {KIND}" in path.read_text(encoding="utf-8")
)


def _read(path: Path) -> tuple[str, Any]:
    text = resolve_relative_uris(path.read_text(encoding="utf-8"), path.parent)
    return text, read_manifest(text, path.name).data


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted_and_planned(path: Path) -> None:
    metadata, spec = parse_manifest(_read(path)[0], path.name)
    plan = make_plan(spec, Facts(), JobIdentity(name=metadata.name, uid="u"))
    product = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size
    assert product == spec.training.global_batch_size


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_json_schema_accepts_an_example(path: Path) -> None:
    assert list(jsonschema.Draft202012Validator(manifest_schema()).iter_errors(_read(path)[1])) == []
