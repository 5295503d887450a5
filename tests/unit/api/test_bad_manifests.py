"""Every manifest under ``bad/`` is refused with exactly these messages, by all judges that can see the fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from finetune_api.errors import SpecError
from finetune_api.json_schema import manifest_schema
from finetune_api.manifest import parse_manifest
from finetune_api.yaml_reader import read_yaml

BAD = Path(__file__).parent / "bad"
EXPECTED: dict[str, dict[str, Any]] = json.loads((BAD / "expected.json").read_text(encoding="utf-8"))


def test_there_are_many_and_each_has_its_messages() -> None:
    files = sorted(path.name for path in BAD.glob("*.yaml"))
    assert files == sorted(EXPECTED)
    assert len(files) >= 60


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_broken_manifest_is_refused_with_these_messages(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_manifest((BAD / name).read_bytes(), name)
    assert [str(problem) for problem in caught.value.problems] == EXPECTED[name]["messages"]


@pytest.mark.parametrize("name", sorted(name for name, entry in EXPECTED.items() if "seenByJsonSchema" in entry))
def test_the_json_schema_refuses_what_it_can_express(name: str) -> None:
    document = read_yaml((BAD / name).read_bytes(), name)
    accepted = jsonschema.Draft202012Validator(manifest_schema()).is_valid(document.data)
    assert accepted is not EXPECTED[name]["seenByJsonSchema"]


def test_no_message_speaks_the_language_of_the_validation_library() -> None:
    words = ("pydantic", "Input should", "type=", "validation error", "Field required", "regex", "NoneType")
    for entry in EXPECTED.values():
        for message in entry["messages"]:
            assert not [word for word in words if word in message]


def test_no_message_repeats_a_password() -> None:
    for name in ("uri-with-password.yaml", "endpoint-with-password.yaml"):
        secret = "secret" if name.startswith("uri") else "user:pass"
        assert not [message for message in EXPECTED[name]["messages"] if f":{secret}@" in message or "pass@" in message]


def test_no_message_repeats_a_signature() -> None:
    for name in ("uri-with-signature.yaml", "endpoint-with-signature.yaml"):
        assert not [message for message in EXPECTED[name]["messages"] if "secret" in message.replace("secretName", "")]
