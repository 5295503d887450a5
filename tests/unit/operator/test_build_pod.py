"""The training pod: what it may, where it goes, what it sees."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.build_shapes import IMAGE, SHAPES, children, container, smallest

from finetune_api.credentials import VARIABLES
from finetune_operator.build import Children

SECRET_NAMES = ("KEY", "SECRET", "TOKEN", "SAS", "CLIENT")


def test_a_pod_may_nothing_that_it_does_not_need() -> None:
    built = shape("one CPU pod")
    pod = pod_of(built)
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container(built)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    assert {name for name in pod if name.startswith(("host", "share", "serviceAccount"))} == set()


def test_a_pod_is_one_container_that_says_its_last_word_in_a_file() -> None:
    built = shape("one CPU pod")
    found = container(built)
    assert (found["name"], found["image"], found["imagePullPolicy"]) == ("trainer", IMAGE, "IfNotPresent")
    assert (found["terminationMessagePath"], found["terminationMessagePolicy"]) == ("/dev/termination-log", "File")
    assert [(port["name"], port["containerPort"]) for port in found["ports"]] == [
        ("rendezvous", 29400),
        ("metrics", 9464),
    ]
    assert (pod_of(built)["restartPolicy"], pod_of(built)["terminationGracePeriodSeconds"]) == ("Never", 120)


def test_ready_means_that_the_launcher_watches_and_nothing_kills_it_for_being_slow() -> None:
    found = container(shape("one CPU pod"))
    assert found["readinessProbe"] == {
        "httpGet": {"path": "/healthz", "port": "metrics"},
        "periodSeconds": 2,
        "timeoutSeconds": 5,
        "failureThreshold": 5,
    }
    assert {"livenessProbe", "startupProbe"}.isdisjoint(found)


def test_only_declared_volumes_can_be_written() -> None:
    built = shape("two CPU pods with amounts")
    assert pod_of(built)["volumes"] == [
        {"name": "config", "configMap": {"name": built.config_map["metadata"]["name"], "defaultMode": 0o444}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "5Gi"}},
        {"name": "work", "emptyDir": {"sizeLimit": "5Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "512Mi"}},
    ]
    assert container(built)["volumeMounts"] == [
        {"name": "config", "mountPath": "/etc/finetune", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "work", "mountPath": "/work"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def test_a_claim_is_mounted_once_and_only_the_output_can_be_written() -> None:
    built = shape("claims, one of them written")
    assert pod_of(built)["volumes"][4:] == [
        {"name": "claim-0", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        {"name": "claim-1", "persistentVolumeClaim": {"claimName": "work.area"}},
    ]
    assert container(built)["volumeMounts"][4:] == [
        {"name": "claim-0", "mountPath": "/mnt/pvc/models", "readOnly": True},
        {"name": "claim-1", "mountPath": "/mnt/pvc/work.area"},
    ]


def test_amounts_are_those_of_the_job() -> None:
    assert container(shape("one CPU pod"))["resources"] == {}
    assert container(shape("two CPU pods with amounts"))["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "5Gi"},
        "limits": {"cpu": "4", "memory": "4Gi"},
    }
    assert container(shape("accelerators and everything placed"))["resources"] == {
        "requests": {"amd.com/gpu": "4"},
        "limits": {"amd.com/gpu": "4"},
    }


def test_a_job_adds_to_the_administrators_placement_and_wins_where_they_differ() -> None:
    built = shape("accelerators and everything placed")
    pod = pod_of(built)
    assert pod["nodeSelector"] == {"pool": "training", "zone": "b", "example.com/rack": "7"}
    assert pod["tolerations"] == [
        {"key": "pool", "operator": "Exists"},
        {"key": "amd.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ]
    assert (pod["priorityClassName"], pod["schedulerName"], pod["runtimeClassName"]) == ("urgent", "other", "nvidia")
    assert pod["imagePullSecrets"] == [{"name": "pull-a"}, {"name": "pull-b"}]
    assert (pod["terminationGracePeriodSeconds"], container(built)["imagePullPolicy"]) == (30, "Always")
    template = built.job["spec"]["template"]["metadata"]
    assert template["annotations"] == {"example.com/note": "x"}
    assert (template["labels"]["team"], template["labels"]["finetune.dev/job"]) == ("ml", "job")


def test_pods_of_a_gang_are_kept_near_where_asked_and_apart_where_possible() -> None:
    own = {"matchLabels": {"app.kubernetes.io/name": "finetune-job", "finetune.dev/job": "job"}}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": own,
    }
    two, placed = shape("two CPU pods with amounts"), shape("accelerators and everything placed")
    assert pod_of(two)["topologySpreadConstraints"] == [spread]
    assert "affinity" not in pod_of(two)
    assert pod_of(placed)["topologySpreadConstraints"] == [spread]
    assert pod_of(placed)["affinity"] == {
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"topologyKey": "example.com/rack", "labelSelector": own}
            ]
        }
    }
    assert {"topologySpreadConstraints", "affinity", "nodeSelector"}.isdisjoint(pod_of(shape("one CPU pod")))


def test_the_environment_of_a_cpu_pod() -> None:
    assert values(shape("one CPU pod")) == {
        "DS_ACCELERATOR": "cpu",
        "HF_HOME": "/work/cache/huggingface",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/tmp",
        "LOGNAME": "finetune",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": "/tmp",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "USER": "finetune",
    }
    fields = {e["name"]: e["valueFrom"] for e in container(shape("one CPU pod"))["env"] if "valueFrom" in e}
    assert {name: field["fieldRef"]["fieldPath"] for name, field in fields.items()} == {
        "NODE_NAME": "spec.nodeName",
        "POD_IP": "status.podIP",
        "POD_NAME": "metadata.name",
    }


@pytest.mark.parametrize(
    ("resources", "ranks", "threads"),
    [
        ({}, 1, None),
        ({"requests": {"cpu": "8"}}, 2, "4"),
        ({"requests": {"cpu": "1"}, "limits": {"cpu": "6500m"}}, 2, "3"),
        ({"limits": {"cpu": "500m"}}, 1, "1"),
        ({"limits": {"cpu": "2"}}, 4, "1"),
    ],
)
def test_threads_are_the_processors_dealt_to_the_ranks(
    resources: dict[str, Any], ranks: int, threads: str | None
) -> None:
    built = children(smallest(resources=resources, distributed={"processesPerNode": ranks}))
    assert values(built).get("OMP_NUM_THREADS") == threads


def test_an_accelerator_and_the_administrator_change_the_environment() -> None:
    found = values(shape("accelerators and everything placed"))
    assert "DS_ACCELERATOR" not in found
    assert (found["NCCL_DEBUG"], found["HOME"]) == ("WARN", "/work")


def test_a_secret_of_a_job_serves_every_location_that_names_none() -> None:
    built = children(smallest(output={"uri": "s3://out/x", "credentials": {"secretName": "my-bucket"}}))
    assert container(built)["envFrom"] == [{"prefix": "FINETUNE_ENV_MY_BUCKET__", "secretRef": {"name": "my-bucket"}}]
    assert references(built) == {f"FINETUNE_ENV__{name}": "my-bucket" for name in VARIABLES["s3"]}


def test_where_every_location_names_its_secret_none_is_shared() -> None:
    credentials = {"credentials": {"secretName": "bucket"}}
    built = children(
        smallest(
            model={"uri": "s3://models/base/"} | credentials,
            dataset={"train": [{"uri": "s3://data/x.jsonl"} | credentials]},
            output={"uri": "s3://out/x"} | credentials,
        )
    )
    assert references(built) == {}


def test_of_several_secrets_that_of_the_same_scheme_is_shared_the_output_first() -> None:
    built = children(
        smallest(
            model={"uri": "hf://org/model", "credentials": {"secretName": "hub"}},
            dataset={
                "train": [
                    {"uri": "s3://a/x.jsonl", "credentials": {"secretName": "first"}},
                    {"uri": "gs://b/x.jsonl"},
                    {"uri": "s3://c/x.jsonl"},
                ]
            },
            output={"uri": "s3://out/x", "credentials": {"secretName": "out"}},
        )
    )
    found = references(built)
    assert found == {"HF_TOKEN": "hub", "HF_ENDPOINT": "hub"} | {
        f"FINETUNE_ENV__{name}": secret
        for scheme, secret in (("s3", "out"), ("gs", "out"))
        for name in VARIABLES[scheme]
    }
    assert [source["secretRef"]["name"] for source in container(built)["envFrom"]] == ["first", "hub", "out"]
    assert "HF_HUB_OFFLINE" not in values(built)


def test_a_job_without_secrets_names_none() -> None:
    built = shape("claims, one of them written")
    assert "envFrom" not in container(built)
    assert references(built) == {}


def test_where_endpoints_are_listed_no_secret_can_name_another() -> None:
    built = shape("two Secrets, endpoints listed")
    assert references(built) == {"HF_TOKEN": "hub"}
    blank = sorted(name for name, value in values(built).items() if value == "")
    endpoints = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL", "HF_ENDPOINT")
    assert blank == [f"FINETUNE_ENV_{name}__{endpoint}" for name in ("DATA", "HUB", "OUT") for endpoint in endpoints]


def test_an_endpoint_cannot_take_the_value_of_another_variable() -> None:
    model = {"uri": "hf://org/model", "endpoint": "https://hub.example/$(AWS_SECRET_ACCESS_KEY)"}
    built = children(smallest(model=model))
    assert values(built)["HF_ENDPOINT"] == "https://hub.example/$$(AWS_SECRET_ACCESS_KEY)"


@pytest.mark.parametrize("name", SHAPES)
def test_variables_are_named_once_and_no_secret_has_a_value(name: str) -> None:
    entries = container(shape(name))["env"]
    names = [entry["name"] for entry in entries]
    assert names == sorted(set(names))
    for entry in entries:
        if any(sign in entry["name"] for sign in SECRET_NAMES) and entry["name"] != "TOKENIZERS_PARALLELISM":
            assert list(entry["valueFrom"]) == ["secretKeyRef"]


def shape(name: str) -> Children:
    spec, settings = SHAPES[name]
    return children(spec, settings)


def pod_of(built: Children) -> dict[str, Any]:
    return dict(built.job["spec"]["template"]["spec"])


def values(built: Children) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(built)["env"] if "value" in entry}


def references(built: Children) -> dict[str, str]:
    """Variable -> Secret, of references that may be empty."""
    found = {e["name"]: e["valueFrom"].get("secretKeyRef") for e in container(built)["env"] if "valueFrom" in e}
    for name, reference in found.items():
        assert reference is None or (reference["key"], reference["optional"]) == (name.rpartition("__")[2], True)
    return {name: ref["name"] for name, ref in found.items() if ref}
