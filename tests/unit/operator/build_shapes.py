"""Jobs of every shape, and their children."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from finetune_api.plan import Facts, Plan
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity
from finetune_api.validation import Place, parse_spec
from finetune_operator.build import Children, build_children
from finetune_operator.settings import OperatorSettings

EXAMPLES = Path(__file__).parents[3] / "examples"
IMAGE = "registry.example/finetune-trainer:0123456789ab"
SETTINGS = OperatorSettings(trainer_image=IMAGE)
FULL_SETTINGS = OperatorSettings.model_validate(
    {
        "trainerImage": IMAGE,
        "trainerImagePullPolicy": "Always",
        "imagePullSecrets": ["pull-a", "pull-b"],
        "podDefaults": {
            "nodeSelector": {"pool": "training", "zone": "a"},
            "tolerations": [{"key": "pool", "operator": "Exists"}],
            "priorityClassName": "batch",
            "runtimeClassName": "nvidia",
            "labels": {"team": "ml", "finetune.dev/job": "not-this-one"},
            "annotations": {"example.com/note": "x"},
            "environment": {"NCCL_DEBUG": "WARN", "HOME": "/work"},
            "terminationGracePeriodSeconds": 30,
            "sharedMemory": "2Gi",
            "scratch": "10Gi",
        },
        "trustRemoteCode": True,
    }
)


def smallest(**blocks: Any) -> dict[str, Any]:
    """The smallest spec as plain data, with whole blocks replaced or added."""
    return {
        "model": {"uri": "s3://models/base/"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://adapters/team"},
        **blocks,
    }


def resource(spec: Mapping[str, Any], name: str = "job", **metadata: Any) -> dict[str, Any]:
    """A FineTuneJob as the API server has it."""
    known = {"name": name, "namespace": "team", "uid": "5a3c7c6e-0000-4000-8000-000000000001", "generation": 1}
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": known | metadata, "spec": spec}


def planned(job: Mapping[str, Any]) -> tuple[FineTuneJobSpec, Plan]:
    """What the operator makes of a FineTuneJob before it builds."""
    spec = parse_spec(job["spec"], place=Place.CLUSTER)
    metadata = job["metadata"]
    identity = JobIdentity(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"])
    return spec, make_plan(spec, Facts(), identity)


def children(
    spec: Mapping[str, Any], settings: OperatorSettings = SETTINGS, name: str = "job", **metadata: Any
) -> Children:
    """The children of a job with this spec."""
    job = resource(spec, name, **metadata)
    return build_children(job, *planned(job), settings)


def container(of: Children) -> dict[str, Any]:
    """The training container."""
    (found,) = of.job["spec"]["template"]["spec"]["containers"]
    return dict(found)


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, FineTuneJob) of every example that runs in a cluster."""
    for file in sorted(EXAMPLES.glob("*.yaml")):
        manifest = YAML(typ="safe").load(file)
        if "file://" not in manifest["spec"]["model"]["uri"]:
            yield file.stem, resource(manifest["spec"], **manifest["metadata"])


SHAPES: dict[str, tuple[dict[str, Any], OperatorSettings]] = {
    "one CPU pod": (smallest(), SETTINGS),
    "two CPU pods with amounts": (
        smallest(
            distributed={"nodes": 2, "processesPerNode": 2},
            resources={
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"cpu": "4", "memory": "4Gi"},
                "sharedMemory": "512Mi",
                "scratch": "5Gi",
            },
        ),
        SETTINGS,
    ),
    "accelerators and everything placed": (
        smallest(
            method={"type": "QLoRA"},
            distributed={"nodes": 2, "strategy": {"type": "FSDP"}},
            resources={"accelerator": {"resourceName": "amd.com/gpu", "count": 4}},
            placement={
                "nodeSelector": {"zone": "b", "example.com/rack": "7"},
                "tolerations": [{"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "priorityClassName": "urgent",
                "schedulerName": "other",
                "topologyKey": "example.com/rack",
            },
        ),
        FULL_SETTINGS,
    ),
    "claims, one of them written": (
        smallest(
            model={"uri": "pvc://models/base"},
            dataset={"train": [{"uri": "pvc://work.area/data/*.jsonl"}]},
            output={"uri": "pvc://work.area/out"},
        ),
        SETTINGS,
    ),
    "two Secrets, endpoints listed": (
        smallest(
            model={"uri": "hf://org/model", "credentials": {"secretName": "hub"}, "endpoint": "https://hub.example"},
            dataset={
                "train": [
                    {
                        "uri": "gs://data/x.jsonl",
                        "credentials": {"secretName": "data"},
                        "endpoint": "https://gs.example",
                    }
                ]
            },
            output={"uri": "s3://out/x", "credentials": {"secretName": "out"}, "endpoint": "https://s3.example"},
        ),
        OperatorSettings.model_validate(
            {
                "trainerImage": IMAGE,
                "uris": {"endpoints": ["https://s3.example", "https://hub.example", "https://gs.example"]},
            }
        ),
    ),
    "suspended, with a deadline": (
        smallest(runPolicy={"suspend": True, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 5}),
        SETTINGS,
    ),
}

GOLDEN = Path(__file__).parents[2] / "golden" / "children"


def golden_text(built: Children) -> str:
    """The children for people: one JSON document; of the TrainerConfig what is neither spec nor plan."""
    config = json.loads(built.config_map["data"]["trainer.json"])
    config = {name: value for name, value in config.items() if name not in {"spec", "plan"}}
    # The digest in the ConfigMap's name changes with every new default of the schema; another test recomputes it.
    name = built.config_map["metadata"]["name"]
    text = json.dumps([{**built.config_map, "data": {"trainer.json": config}}, built.service, built.job], indent=1)
    return text.replace(name, f"{name[:-8]}00000000") + "\n"


if __name__ == "__main__":  # python -m tests.unit.operator.build_shapes writes the golden files
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for word, job in examples():
        (GOLDEN / f"{word}.json").write_text(golden_text(build_children(job, *planned(job), SETTINGS)))
