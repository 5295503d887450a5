"""Three judges, one verdict: pydantic, JSON Schema, and a real API server (structural schema, CEL, strict fields)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tests.apiserver.kube import Kube
from tests.apiserver.manifests import BAD, GOOD
from tests.apiserver.server import REPOSITORY

from finetune_api.errors import SpecError
from finetune_api.manifest import Place, parse_manifest
from finetune_api.schema_conditions import INEXPRESSIBLE
from finetune_api.yaml_reader import read_yaml

EXAMPLES = REPOSITORY / "examples"
BROKEN = REPOSITORY / "tests" / "unit" / "api" / "bad"

# Verdicts that differ, each with the only reason there may be.
ARITHMETIC, RANKS, WARMUP, LIMITS, NAMES, SOURCES, PLACE = INEXPRESSIBLE
UNSEEN_BY_JSON_SCHEMA = {
    "batch-does-not-divide-micro.yaml": ARITHMETIC,
    "batch-does-not-divide-ranks.yaml": ARITHMETIC,
    "batch-smaller-than-ranks.yaml": ARITHMETIC,
    "more micro-batch than ranks allow": ARITHMETIC,
    "a default batch that three nodes cannot share": ARITHMETIC,
    "ranks-without-accelerators.yaml": RANKS,
    "warmup-longer-than-training.yaml": WARMUP,
    "request-above-limit.yaml": LIMITS,
    "saved-and-adapted.yaml": NAMES,
    "source-listed-twice.yaml": SOURCES,
    "validation-is-training-data.yaml": SOURCES,
    "validation listed twice": SOURCES,
    "local-cpu.yaml": PLACE,
    "relative-file.yaml": PLACE,
}
# The API server drops a null where the schema knows none, and judges (and stores) what remains. Our tools refuse it,
# because 'training:' with nothing below it is a mistake of indentation.
UNSEEN_BY_THE_SERVER = ("empty-block.yaml", "null-value.yaml")


def _read(path: Path) -> Any:
    """The file as plain data, or None where it is no YAML document that JSON could carry."""
    document = read_yaml(path.read_bytes(), path.name)
    return None if document.problems else document.data


def _manifests() -> dict[str, dict[str, Any]]:
    """Everything that can be sent to an API server at all: one mapping with a name."""
    found: dict[str, Any] = {}
    for path in (*sorted(EXAMPLES.glob("*.yaml")), *sorted(BROKEN.glob("*.yaml"))):
        try:
            data = _read(path)
        except SpecError:
            continue
        if isinstance(data, dict):
            found[path.name] = data
    return {**found, **GOOD, **BAD}


MANIFESTS = _manifests()


def _pydantic(data: Any) -> bool:
    try:
        parse_manifest(json.dumps(data), "manifest", Place.CLUSTER)
    except SpecError:
        return False
    return True


def _server(kube: Kube, data: Any) -> bool:
    path = kube.path("FineTuneJob")
    answer = kube.call("POST", path, data, fieldValidation="Strict", dryRun="All")
    assert answer.code in {201, 400, 422}, answer
    return answer.code == 201


def test_there_are_many_of_both_kinds() -> None:
    assert len(MANIFESTS) >= 160
    assert len(GOOD) >= 40


def test_the_three_judges_agree_on_every_manifest(kube: Kube) -> None:
    schema = json.loads((REPOSITORY / "docs" / "finetunejob.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    verdicts = {
        name: (_pydantic(data), validator.is_valid(data), _server(kube, data)) for name, data in MANIFESTS.items()
    }
    good = set(GOOD) | {path.name for path in EXAMPLES.glob("*.yaml")} - {"local-cpu.yaml"}
    expected = {
        name: (
            name in good,
            name in good or name in UNSEEN_BY_JSON_SCHEMA,
            name in good or name in UNSEEN_BY_THE_SERVER,
        )
        for name in MANIFESTS
    }
    assert {name: verdict for name, verdict in verdicts.items() if verdict != expected[name]} == {}


@pytest.mark.parametrize(
    ("change", "block"),
    [
        ({"model": {"uri": "s3://models/other/"}}, "model"),
        ({"dataset": {"maxSequenceLength": 16}}, "dataset"),
        ({"method": {"type": "QLoRA"}}, "method"),
        ({"output": {"uri": "s3://elsewhere"}}, "output"),
        ({"training": {"learningRate": 0.1}}, "training"),
        ({"distributed": {"nodes": 2}}, "distributed"),
        ({"task": {"type": "CausalLM"}}, "task"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_defines_the_result_cannot_be_changed(kube: Kube, change: dict[str, Any], block: str) -> None:
    kube.create(GOOD["the smallest job"])
    answer = kube.call(
        "PATCH",
        kube.path("FineTuneJob", "support-bot"),
        {"spec": change},
        content_type="application/merge-patch+json",
    )
    message = f"spec.{block} is immutable because it defines the result; create a new job with another name"
    assert answer.code == 422
    assert message in answer.body["message"]
    assert len(answer.body["details"]["causes"]) == 1


def test_run_policy_checkpoints_and_metadata_can_be_changed(kube: Kube) -> None:
    kube.create(GOOD["the smallest job"])
    kube.patch("FineTuneJob", "support-bot", {"spec": {"runPolicy": {"suspend": True}}})
    kube.patch("FineTuneJob", "support-bot", {"spec": {"checkpoint": {"everySteps": 10, "keep": 5}}})
    kube.patch("FineTuneJob", "support-bot", {"spec": {"runPolicy": {"suspend": False, "maxRestarts": 9}}})
    kube.patch("FineTuneJob", "support-bot", {"metadata": {"labels": {"team": "nlp"}}})
    job = kube.get("FineTuneJob", "support-bot")
    assert job["spec"] == {
        **GOOD["the smallest job"]["spec"],
        "runPolicy": {"suspend": False, "maxRestarts": 9},
        "checkpoint": {"everySteps": 10, "keep": 5},
    }
    assert (job["metadata"]["labels"], job["metadata"]["generation"]) == ({"team": "nlp"}, 4)


def test_the_server_stores_no_default(kube: Kube) -> None:
    """Defaults are the plan's, with reasons; an object that carried them could not be told from one that asked."""
    created = kube.create(GOOD["the smallest job"])
    assert created["spec"] == GOOD["the smallest job"]["spec"]
