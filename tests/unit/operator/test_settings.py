"""config.json: what every pod would be refused for is refused once, when the operator starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.pod_defaults import TAKEN

from finetune_api.errors import SpecError
from finetune_operator.settings import OperatorSettings, read_settings

NO_KEY = "is no key, which is NAME or PREFIX/NAME, such as example.com/team"
NO_VALUE = "is no label value, which is up to 63 letters, digits, '-', '_' and '.'"
NO_IMAGE = "is no image, which is REPOSITORY, then :TAG or @sha256:DIGEST or both"


def refusal(tmp_path: Path, settings: dict[str, Any]) -> list[str]:
    """What is said of ``settings``, a line each, without the remedy."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"trainerImage": "trainer:1", "lease": {"enabled": False}} | settings))
    with pytest.raises(SpecError) as caught:
        read_settings(path)
    remedy = f"; correct {path}"
    assert all(line.endswith(remedy) for line in str(caught.value).splitlines())
    return [line.removesuffix(remedy) for line in str(caught.value).splitlines()]


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"labels": {"a b": "c"}}, f"labels.a b: {NO_KEY} ('a b')"),
        ({"labels": {"A.b/c": "d"}}, f"labels.A.b/c: {NO_KEY} ('A.b/c')"),
        ({"labels": {"a": "b c"}}, f"labels.a: {NO_VALUE} ('b c')"),
        ({"labels": {"a": "b\n"}}, f"labels.a: {NO_VALUE} ('b\\n')"),
        ({"annotations": {"a/b/c": "d"}}, f"annotations.a/b/c: {NO_KEY} ('a/b/c')"),
        ({"nodeSelector": {"-pool": "gpu"}}, f"nodeSelector.-pool: {NO_KEY} ('-pool')"),
        ({"nodeSelector": {"pool": "gpu/a"}}, f"nodeSelector.pool: {NO_VALUE} ('gpu/a')"),
        ({"nodeSelector": {"pool": "g" * 64}}, f"nodeSelector.pool: {NO_VALUE} ('{'g' * 64}')"),
        (
            {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]},
            "tolerations.0: operator Exists takes no value ({'key': 'a', 'operator': 'Exists', 'value': 'b'})",
        ),
        (
            {"tolerations": [{"key": "a", "operator": "Exists"}, {"value": "b"}]},
            "tolerations.1: has no key, which goes with operator Exists only ({'value': 'b'})",
        ),
        (
            {"tolerations": [{"key": "a", "tolerationSeconds": 5}]},
            "tolerations.0: only effect NoExecute is tolerated for a time ({'key': 'a', 'tolerationSeconds': 5})",
        ),
        ({"tolerations": [{"key": "a b"}]}, f"tolerations.0: {NO_KEY} ({{'key': 'a b'}})"),
        (
            {"tolerations": [{"key": "a", "value": "b c"}]},
            f"tolerations.0: {NO_VALUE} ({{'key': 'a', 'value': 'b c'}})",
        ),
    ],
)
def test_what_every_pod_would_be_refused_for_is_refused_at_once(
    tmp_path: Path, defaults: dict[str, Any], said: str
) -> None:
    assert refusal(tmp_path, {"podDefaults": defaults}) == [f"podDefaults.{said}"]


@pytest.mark.parametrize("image", ["reg.example/op:1:0.1.0", "reg.example/Op:1", "https://reg.example/op", "op:"])
def test_a_name_that_is_no_image_is_refused(tmp_path: Path, image: str) -> None:
    assert refusal(tmp_path, {"trainerImage": image}) == [f"trainerImage: {NO_IMAGE} ({image!r})"]


@pytest.mark.parametrize(
    "image",
    ["trainer:1", "localhost:5000/x", "a.example:443/b/c_d/e__f--g.h:v1@sha256:" + "0" * 64, "Host/x:" + "t" * 128],
)
def test_an_image_is_taken(image: str) -> None:
    assert OperatorSettings(trainer_image=image).trainer_image == image


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    settings = {"podDefaults": {"labels": {"a b": "c d"}}, "concurrency": 0, "pods": 1}
    assert refusal(tmp_path, settings) == [
        f"podDefaults.labels.a b: {NO_KEY} ('a b')",
        f"podDefaults.labels.a b: {NO_VALUE} ('c d')",
        "concurrency: input should be greater than or equal to 1 (0)",
        "pods: is not a setting (1)",
    ]


def test_what_kubernetes_takes_is_taken() -> None:
    settings = OperatorSettings.model_validate({"trainerImage": "trainer:1", "podDefaults": TAKEN})
    assert settings.pod_defaults.model_dump(mode="json", by_alias=True, exclude_unset=True) == TAKEN
