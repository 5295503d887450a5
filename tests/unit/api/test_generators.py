"""Generated files are fresh, structural, bounded and complete."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from finetune_api.crd import custom_resource_definition
from finetune_api.descriptions import DESCRIPTIONS
from finetune_api.exits import Cause, ExitClass
from finetune_api.fields import DATA_URI_PATTERN, MODEL_URI_PATTERN, OUTPUT_URI_PATTERN, SchemaModel
from finetune_api.generate import FILES, main, stale_files
from finetune_api.introspect import model_of
from finetune_api.json_schema import manifest_schema
from finetune_api.schema_tree import schema_of
from finetune_api.sentences import known_patterns
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

ROOT = Path(__file__).parents[3]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, member in schema.get("properties", {}).items():
        yield from nodes(member, f"{path}.{name}" if path else name)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def crd_nodes() -> list[tuple[str, dict[str, Any]]]:
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return [(path, node) for path, node in nodes(schema) if path.partition(".")[0] in {"spec", "status"}]


def test_committed_files_are_fresh() -> None:
    assert stale_files(ROOT) == {}


def test_check_names_the_stale_file_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
    target = tmp_path / "crds" / "finetune.dev_finetunejobs.yaml"
    target.write_text(target.read_text(encoding="utf-8").replace("ftj", "job"), encoding="utf-8")
    capsys.readouterr()
    assert main([str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err == (
        "crds/finetune.dev_finetunejobs.yaml: not fresh; run 'python -m finetune_api.generate'\n"
    )


def test_generation_is_deterministic() -> None:
    code = "import hashlib; from finetune_api.generate import FILES\n"
    code += "print(hashlib.sha256(''.join(build() for build in FILES.values()).encode()).hexdigest())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    assert len(FILES) == 5


def test_the_crd_is_structural() -> None:
    for path, node in crd_nodes():
        assert not {"$ref", "anyOf", "oneOf", "allOf", "default"} & set(node), path
        assert node.get("type") or node.get("x-kubernetes-preserve-unknown-fields"), path


def test_everything_in_the_crd_is_bounded() -> None:
    for path, node in crd_nodes():
        kind = node["type"]
        if kind == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if kind == "array":
            assert "maxItems" in node, path
        if kind in {"integer", "number"}:
            assert {"minimum", "maximum"} <= set(node), path
        if kind == "object" and "properties" not in node:
            assert "maxProperties" in node, path


def test_every_field_of_the_spec_is_described() -> None:
    missing = [path for path, _ in nodes(schema_of(FineTuneJobSpec, "spec"), "spec") if path not in DESCRIPTIONS]
    leaves = ("targetModules[]", "modulesToSave[]", "nodeSelector[]")
    assert [path for path in missing if not path.endswith(leaves)] == []


def test_no_description_is_about_a_field_that_is_gone() -> None:
    known = {path for path, _ in nodes(schema_of(FineTuneJobSpec, "spec"), "spec")}
    known |= {path for path, _ in nodes(schema_of(FineTuneJobStatus, "status"), "status")}
    known |= {f"metadata{'.' if name else ''}{name}" for name in ("", "name", "namespace", "labels", "annotations")}
    assert [path for path in DESCRIPTIONS if path not in known] == []


def test_rules_name_existing_fields_and_say_what_to_do() -> None:
    paths = {path for path, _ in crd_nodes()}
    for path, node in crd_nodes():
        for rule in node.get("x-kubernetes-validations", ()):
            assert path in paths
            assert ";" in rule["message"], rule
            assert len(rule["message"]) <= 200
            for block, member in re.findall(r"spec\.([a-z]\w*)\.([a-z]\w+)", rule["message"]):
                assert any(known.startswith(f"spec.{block}.{member}") for known in paths), rule["message"]


def test_what_defines_the_result_is_immutable() -> None:
    rules = dict(crd_nodes())["spec"]["x-kubernetes-validations"]
    frozen = {rule["message"].split()[0] for rule in rules if "oldSelf" in rule["rule"]}
    assert frozen == {
        *("spec.model", "spec.dataset", "spec.task", "spec.method", "spec.training", "spec.distributed", "spec.output")
    }
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    rules = schema["x-kubernetes-validations"]
    assert {rule["message"].split()[0] for rule in rules if "oldSelf" in rule["rule"]} == {
        *("spec.resources", "spec.placement", "spec.checkpoint")
    }


def test_the_editor_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(manifest_schema())


def test_every_pattern_has_words() -> None:
    uris = {MODEL_URI_PATTERN, DATA_URI_PATTERN, OUTPUT_URI_PATTERN}  # told by uris.uri_trouble
    patterns = {node["pattern"] for _, node in nodes(schema_of(FineTuneJobSpec, "spec"), "spec") if "pattern" in node}
    assert patterns - uris <= known_patterns()


def test_every_exit_class_has_its_own_code_and_comes_back() -> None:
    assert len({end.code for end in ExitClass}) == len(ExitClass)
    assert [ExitClass.from_code(end.code) for end in ExitClass] == list(ExitClass)
    assert (ExitClass.from_code(-9), ExitClass.from_code(137)) == (ExitClass.RANK_KILLED, ExitClass.RANK_KILLED)
    assert ExitClass.from_code(3) is ExitClass.INTERNAL_ERROR
    assert not [end for end in ExitClass if end.restartable and end.cause is Cause.USER]


def test_unions_in_the_schema_are_blocks_named_after_their_type() -> None:
    method = model_of(FineTuneJobSpec.model_fields["method"].annotation)
    assert method is not None
    assert issubclass(method, SchemaModel)
    assert set(method.model_fields) == {"type", "lora", "quantization"}


@pytest.mark.parametrize("heavy", ["torch", "numpy", "transformers", "obstore", "kopf", "rich", "ruamel.yaml"])
def test_the_planner_imports_nothing_heavy(heavy: str) -> None:
    code = f"import sys, finetune_api.manifest, finetune_api.planner; print({heavy!r} in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
