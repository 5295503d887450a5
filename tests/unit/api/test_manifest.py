"""Reading manifests: YAML 1.2, lines, places, and that nothing escapes as a library's own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.errors import Problem, SpecError
from finetune_api.manifest import Place, parse_manifest, parse_spec, read_manifest

from .specs import data

GOOD = """apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: job, namespace: team}
spec:
  model: {uri: "s3://models/base/"}
  dataset: {train: [{uri: "s3://data/train.jsonl"}]}
  method: {type: LoRA}
  training: {learningRate: 2e-4, maxSteps: 1e3}
  distributed: {strategy: {type: DeepSpeed, deepspeed: {offloadOptimizer: None}}}
  output: {uri: "s3://adapters/team"}
"""


def test_numbers_are_read_as_yaml_1_2() -> None:
    read = read_manifest("a: 2e-4\nb: 1e3\nc: 0x1F\nd: 0o17\ne: +3\nf: .5\ng: 1_000\nh: 017\ni: 12:30\nj: 2024-01-01\n")
    assert read.data == {
        "a": 2e-4,
        "b": 1000.0,
        "c": 31,
        "d": 15,
        "e": 3,
        "f": 0.5,
        "g": "1_000",
        "h": "017",
        "i": "12:30",
        "j": "2024-01-01",
    }


def test_words_that_were_booleans_in_yaml_1_1_are_words() -> None:
    assert read_manifest("[no, yes, on, off, y, None, null, ~, true, 'true']").data == [
        *("no", "yes", "on", "off", "y", "None"),
        *(None, None, True, "true"),
    ]


def test_a_job_is_read_whole() -> None:
    metadata, spec = parse_manifest(GOOD)
    assert (metadata.name, metadata.namespace) == ("job", "team")
    assert (spec.training.learning_rate, spec.training.max_steps) == (2e-4, 1000)
    assert spec.distributed.strategy.deepspeed is not None
    assert spec.distributed.strategy.deepspeed.offload_optimizer.value == "None"


def test_json_is_read_as_well() -> None:
    text = '{"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job"}, "spec": {\n'
    text += '\t"model": {"uri": "s3://m/b"}, "dataset": {"train": [{"uri": "s3://d/t.jsonl"}]},\n'
    text += '"method": {"type": "Full"}, "output": {"uri": "s3://o/x"}}}'
    assert parse_manifest(text)[1].method.type.value == "Full"


def test_what_the_api_server_adds_is_ignored() -> None:
    text = (
        GOOD.replace("{name: job,", "{uid: x, generation: 3, managedFields: [], name: job,")
        + "status: {state: Running}\n"
    )
    assert parse_manifest(text)[0].name == "job"


def test_lines_point_at_the_field() -> None:
    document = read_manifest(GOOD)
    assert document.lines[("spec", "training", "maxSteps")] == 8
    assert document.lines[("spec", "dataset", "train", 0, "uri")] == 6


def test_an_anchor_may_be_reused() -> None:
    text = GOOD.replace('model: {uri: "s3://models/base/"}', 'model: {uri: &b "s3://bucket/x"}').replace(
        '"s3://adapters/team"', "*b"
    )
    assert parse_manifest(text)[1].output.uri == "s3://bucket/x"


def test_a_file_is_refused_in_a_cluster_and_a_claim_without_one() -> None:
    obj = data(output={"uri": "file:///tmp/out"}, model={"uri": "pvc://models/base"})
    parse_spec(obj)
    with pytest.raises(SpecError) as cluster:
        parse_spec(obj, place=Place.CLUSTER)
    with pytest.raises(SpecError) as local:
        parse_spec(obj, place=Place.LOCAL)
    assert [str(p) for p in cluster.value.problems] == [
        "spec.output.uri: file:// names nothing that all pods of a cluster share ('file:///tmp/out'); "
        "use object storage or pvc://, or run it with 'finetune run'"
    ]
    assert [str(p) for p in local.value.problems] == [
        "spec.model.uri: pvc:// names a volume of a cluster ('pvc://models/base'); use file:// for a local run"
    ]


def test_a_manifest_that_is_too_long_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        parse_manifest("#" * (201 * 1024), "big.yaml")
    assert str(caught.value) == "big.yaml: is 201 KiB and a manifest has at most 200 KiB; shorten it"


def test_null_switches_off_what_has_a_default() -> None:
    spec = parse_spec(data(training={"maxGradientNorm": None}, checkpoint={"everyMinutes": None}))
    assert (spec.training.max_gradient_norm, spec.checkpoint.every_minutes) == (None, None)


def test_rules_are_still_asked_when_other_fields_are_broken() -> None:
    obj = data(
        training={"epochs": 1, "maxSteps": 2, "seed": "x"}, model={}, method={"type": "Full", "lora": {"rank": "x"}}
    )
    with pytest.raises(SpecError) as caught:
        parse_spec(obj)
    assert {problem.path for problem in caught.value.problems} == {
        "spec.training.seed",
        "spec.training",
        "spec.model.uri",
        "spec.method.lora.rank",
    }


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_BLOCKS = (
    "model",
    "dataset",
    "task",
    "method",
    "training",
    "distributed",
    "resources",
    "placement",
    "checkpoint",
    "output",
)
_MEMBERS = (
    "uri",
    "type",
    "train",
    "lora",
    "schedule",
    "strategy",
    "nodes",
    "seed",
    "accelerator",
    "tolerations",
    "rank",
)


_WORDS = ("pydantic", "Input should", "type=", "NoneType", "Traceback", "is not valid", "form that is not allowed")


def _problems(read: Callable[[], object]) -> tuple[Problem, ...]:
    """What ``read`` complains of; any other exception than SpecError fails the test."""
    try:
        read()
    except SpecError as error:
        return error.problems
    return ()


def _jargon(problems: tuple[Problem, ...]) -> list[str]:
    return [str(p) for p in problems if not p.rule or any(word in f"{p.rule} {p.remedy}" for word in _WORDS)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(_BLOCKS), st.dictionaries(st.sampled_from(_MEMBERS), _JSON, max_size=4) | _JSON))
def test_any_object_gives_a_spec_or_sentences(blocks: dict[str, Any]) -> None:
    problems = _problems(lambda: parse_spec(data(**blocks)))
    assert _jargon(problems) == []


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.sampled_from([*"\t:-[]{}'\"&*!|>%@`#,\n \x00é", "<<: ", "---\n", "? "]))
def test_any_damage_to_the_text_gives_a_spec_or_sentences(position: int, damage: str) -> None:
    problems = _problems(lambda: parse_manifest(GOOD[:position] + damage + GOOD[position:]))
    assert _jargon(problems) == []
