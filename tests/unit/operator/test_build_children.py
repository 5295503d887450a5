"""The children of a FineTuneJob: complete, deterministic, and never a place for a secret."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from tests.unit.operator.build_shapes import (
    FULL_SETTINGS,
    GOLDEN,
    SETTINGS,
    SHAPES,
    children,
    examples,
    golden_text,
    planned,
    resource,
    smallest,
)

from finetune_api.errors import SpecError
from finetune_api.spec import MethodType
from finetune_api.trainer_config import TrainerConfig
from finetune_operator.build import Children, build_children
from finetune_operator.observe import job_view

OWNER = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "name": "job",
    "uid": "5a3c7c6e-0000-4000-8000-000000000001",
    "controller": True,
}
LABELS = {
    "app.kubernetes.io/name": "finetune-job",
    "app.kubernetes.io/managed-by": "finetune-operator",
    "finetune.dev/job": "job",
}


@pytest.mark.parametrize(("name", "job"), list(examples()), ids=[name for name, _ in examples()])
def test_the_children_of_an_example_are_the_golden_ones(name: str, job: dict[str, Any]) -> None:
    # After a change that is meant: python -m tests.unit.operator.build_shapes
    assert golden_text(build_children(job, *planned(job), SETTINGS)) == (GOLDEN / f"{name}.json").read_text()


def test_every_golden_file_belongs_to_an_example() -> None:
    assert sorted(file.stem for file in GOLDEN.iterdir()) == [name for name, _ in examples()]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_child_carries_owner_and_labels(shape: str) -> None:
    spec, operator_settings = SHAPES[shape]
    built = children(spec, operator_settings)
    assert [child["kind"] for child in built.manifests] == ["ConfigMap", "Service", "Job"]
    for child in built.manifests:
        assert child["metadata"]["ownerReferences"] == [OWNER]
        assert child["metadata"]["labels"] == LABELS
        assert child["metadata"]["namespace"] == "team"
    pod = built.job["spec"]["template"]["metadata"]["labels"]
    assert {name: pod[name] for name in LABELS} == LABELS
    assert built.service["spec"]["selector"].items() <= pod.items()


def test_names_are_those_that_everybody_knows() -> None:
    built = children(smallest(), name="support-bot")
    content = built.config_map["data"]["trainer.json"]
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    assert [child["metadata"]["name"] for child in built.manifests] == [
        f"ftj-support-bot-{digest}",
        "ftj-support-bot",
        "ftj-support-bot",
    ]
    assert built.job["spec"]["template"]["spec"]["subdomain"] == "ftj-support-bot"
    assert json.loads(content)["rendezvous"]["endpoint"] == "ftj-support-bot-0.ftj-support-bot:29400"
    assert job_view(_as_stored(built.job)).config_map == f"ftj-support-bot-{digest}"


def test_the_longest_name_gives_names_that_kubernetes_takes() -> None:
    built = children(smallest(distributed={"nodes": 2}), name="a" * 50)
    assert len(built.job["metadata"]["name"] + "-4095") <= 63  # host name of the last pod of the largest job
    assert len(built.service["metadata"]["name"]) <= 63


def test_an_existing_job_keeps_the_config_map_that_its_pods_mount() -> None:
    job = resource(smallest())
    built = build_children(job, *planned(job), SETTINGS, config_map_name="ftj-job-00c0ffee")
    assert built.config_map["metadata"]["name"] == "ftj-job-00c0ffee"
    assert built.job["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"] == "ftj-job-00c0ffee"


def test_what_may_change_while_a_job_runs_does_not_change_its_config_map() -> None:
    running = children(smallest())
    changed = children(smallest(runPolicy={"suspend": True, "activeDeadlineSeconds": 9, "ttlSecondsAfterFinished": 9}))
    assert changed.config_map == running.config_map
    fewer = children(smallest(runPolicy={"maxRestarts": 0}))
    assert fewer.config_map["metadata"]["name"] != running.config_map["metadata"]["name"]


def test_the_trainer_reads_what_the_operator_planned() -> None:
    job = resource(smallest(training={"maxGradientNorm": None}, checkpoint={"everyMinutes": None, "everySteps": 5}))
    spec, plan = planned(job)
    config = _config(build_children(job, spec, plan, FULL_SETTINGS))
    assert (config.spec, config.plan) == (spec, plan)
    assert (config.spec.training.max_gradient_norm, config.spec.checkpoint.every_minutes) == (None, None)
    assert config.model_dump(exclude={"spec", "plan"}) == {
        "schema_version": 1,
        "job": {"namespace": "team", "name": "job", "uid": "5a3c7c6e-0000-4000-8000-000000000001"},
        "rendezvous": {
            "endpoint": "ftj-job-0.ftj-job:29400",
            "minimum_nodes": 1,
            "maximum_nodes": 1,
            "timeout_seconds": 600,
        },
        "work_directory": "/work/run",
        "cache_directory": "/work/cache",
        "metrics_port": 9464,
        "termination_message_path": "/dev/termination-log",
        "termination_grace_seconds": 24,
        "collective_timeout_seconds": 600,
        "allow_remote_code": True,
    }


def test_a_configuration_that_no_config_map_holds_is_refused_with_a_sentence() -> None:
    uri = "s3://data/" + "x" * 1000
    sources = [{"uri": f"{uri}{number}"} for number in range(64)]
    spec = smallest(dataset={"train": sources, "validation": {"sources": [{"uri": f"{s['uri']}v"} for s in sources]}})
    assert len(children(spec).config_map["data"]["trainer.json"]) < 1024 * 1024  # as large as the schema allows

    job = resource(spec)
    typed, plan = planned(job)
    with pytest.raises(SpecError) as caught:
        build_children(job, typed, plan.model_copy(update={"warnings": ("x" * 1_000_000,)}), SETTINGS)
    assert str(caught.value) == (
        "spec: makes a trainer configuration of 1.1 MiB, and a ConfigMap holds 1008.0 KiB; "
        "name fewer data sources, for instance with a '*' in spec.dataset.train[].uri"
    )


STRATEGIES: tuple[dict[str, Any], ...] = (
    {"type": "Auto"},
    {"type": "DDP"},
    {"type": "FSDP"},
    {"type": "FSDP", "fsdp": {"sharding": "GradientAndOptimizer", "cpuOffload": True}},
    {"type": "DeepSpeed", "deepspeed": {"zeroStage": 2}},
    {"type": "DeepSpeed", "deepspeed": {"zeroStage": 3, "offloadOptimizer": "CPU"}},
)


@settings(max_examples=150, deadline=None)
@given(
    method=st.sampled_from([method.value for method in MethodType]),
    strategy=st.sampled_from(STRATEGIES),
    nodes=st.integers(1, 4),
    processes=st.sampled_from([None, 1, 2]),
    accelerators=st.sampled_from([None, 1, 2]),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_combination_that_can_be_planned_can_be_built_and_read_back(
    method: str, strategy: dict[str, Any], nodes: int, processes: int | None, accelerators: int | None, seed: int
) -> None:
    distributed = {"nodes": nodes, "strategy": strategy, **({"processesPerNode": processes} if processes else {})}
    accelerator = {"accelerator": {"count": accelerators}} if accelerators else {}
    job = resource(
        smallest(
            method={"type": method},
            distributed=distributed,
            resources=accelerator,
            training={"globalBatchSize": 48, "seed": seed},
        )
    )
    try:
        spec, plan = planned(job)
    except SpecError:  # the planner's tests say which and why
        reject()
    built = build_children(job, spec, plan, SETTINGS)
    config = _config(built)
    assert (config.spec, config.plan, config.rendezvous.minimum_nodes) == (spec, plan, nodes)
    assert (built.job["spec"]["completions"], built.job["spec"]["parallelism"]) == (nodes, nodes)
    again = build_children(json.loads(json.dumps(job)), *planned(job), SETTINGS)
    assert json.dumps(built.manifests) == json.dumps(again.manifests)


def test_no_value_of_a_child_is_a_secret_or_a_shell_line() -> None:
    for spec, operator_settings in SHAPES.values():
        built = children(spec, operator_settings)
        entries = _container(built)["env"]
        values = {entry["name"]: entry["value"] for entry in entries if "value" in entry}
        secret = [name for name in values if any(sign in name for sign in ("KEY", "SECRET", "TOKEN", "SAS"))]
        assert [name for name in secret if name != "TOKENIZERS_PARALLELISM"] == []
        assert _container(built)["command"] == [
            "python",
            "-m",
            "finetune_trainer",
            "--config",
            "/etc/finetune/trainer.json",
        ]
        assert "args" not in _container(built)
        assert "initContainers" not in built.job["spec"]["template"]["spec"]


def _container(built: Children) -> dict[str, Any]:
    (found,) = built.job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def _config(built: Children) -> TrainerConfig:
    return TrainerConfig.model_validate_json(built.config_map["data"]["trainer.json"])


def _as_stored(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "metadata": {**job["metadata"], "uid": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}}
