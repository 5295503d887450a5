"""Digests: equal exactly where what they stand for is equal."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.digest import training_digest
from finetune_api.manifest import result_digest

from .specs import gpus, spec

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"task": {"type": "CausalLM"}, "training": {}, "distributed": {"nodes": 1, "processesPerNode": 1}}),
    ({}, {"method": {"type": "LoRA", "lora": {}}}),
    ({}, {"method": {"type": "LoRA", "lora": {"rank": 16, "alpha": 32, "targetModules": ["all-linear"]}}}),
    ({}, {"training": {"epochs": 1, "learningRate": 2e-4, "schedule": {"warmupFraction": 0.03}}}),
    ({}, {"output": {"uri": "s3://adapters/team", "format": "Adapter", "credentials": {"secretName": "other"}}}),
    ({}, {"checkpoint": {"everySteps": 5}, "runPolicy": {"maxRestarts": 9}, "placement": {"schedulerName": "x"}}),
    (
        {"method": {"type": "QLoRA"}},
        {"method": {"type": "QLoRA", "quantization": {"doubleQuantization": True, "computeType": "BF16"}}},
    ),
    (
        {"distributed": {"strategy": {"type": "FSDP"}}},
        {"distributed": {"strategy": {"type": "FSDP", "fsdp": {"sharding": "Full"}}}},
    ),
    (
        {"distributed": {"strategy": {"type": "DeepSpeed"}}},
        {"distributed": {"strategy": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 2}}}},
    ),
    ({"resources": gpus(4)}, {"resources": gpus(4, "40Gi"), "distributed": {"processesPerNode": 4}}),
]
DIFFERENT: list[dict[str, Any]] = [
    {"training": {"seed": 1}},
    {"training": {"epochs": 2}},
    {"training": {"schedule": {"warmupSteps": 3}}},
    {"method": {"type": "LoRA", "lora": {"rank": 8}}},
    {"method": {"type": "QLoRA"}},
    {"model": {"uri": "s3://models/other/"}},
    {"dataset": {"train": [{"uri": "s3://data/train.jsonl", "weight": 2}]}},
    {"output": {"uri": "s3://adapters/other"}},
    {"output": {"uri": "s3://adapters/team", "endpoint": "http://minio:9000"}},
    {"distributed": {"nodes": 2}},
    {"distributed": {"strategy": {"type": "FSDP"}}},
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_what_says_the_same_has_one_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert result_digest(spec(**one)) == result_digest(spec(**other))


def test_what_changes_the_result_changes_the_digest() -> None:
    digests = {result_digest(spec(**blocks)) for blocks in DIFFERENT} | {result_digest(spec())}
    assert len(digests) == len(DIFFERENT) + 1


def test_the_digest_is_stable_between_versions() -> None:
    assert result_digest(spec()) == "0958bf8d84cd2070d9189c153040cb3bd5cbec0c533d0cb977b129ef33e2da89"


def test_a_checkpoint_may_move_to_other_ranks_but_not_to_other_training() -> None:
    here = spec()
    ranks = spec(distributed={"processesPerNode": 2, "strategy": {"type": "FSDP"}})
    micro = spec(training={"microBatchSize": 1, "gradientCheckpointing": "Full"})
    elsewhere = spec(output={"uri": "s3://other/place"})
    other = spec(training={"learningRate": 1.0e-3})
    digests = [training_digest(one) for one in (here, ranks, micro, elsewhere, other)]
    assert [digest == digests[0] for digest in digests] == [True, True, True, True, False]
