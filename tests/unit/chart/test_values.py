"""What can be said in values.yaml, what is refused, and what the operator gets to see of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from tests.chart import CHART, DIGEST, ROOT, Document, helm, load_yaml, one, refusal, render, settings_of
from tests.pod_defaults import TAKEN

from finetune_operator.settings import OperatorSettings

VALUES: Document = load_yaml((CHART / "values.yaml").read_text(encoding="utf-8"))
SCHEMA: Document = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def test_helm_lint_finds_nothing() -> None:
    done = helm("lint", "--strict", "--quiet", str(CHART))
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


def _keys(value: Any, path: str = "") -> set[str]:
    if not isinstance(value, dict) or not value:
        return {path}
    return {key for name, inner in value.items() for key in _keys(inner, f"{path}.{name}".lstrip("."))}


def _schema_keys(schema: Document, path: str = "") -> set[str]:
    if schema.get("additionalProperties") is not False:
        return {path}
    return {
        key for name, inner in schema["properties"].items() for key in _schema_keys(inner, f"{path}.{name}".lstrip("."))
    }


def test_the_schema_knows_exactly_the_keys_of_values_yaml() -> None:
    known = {key.partition("affinity.")[0] + "affinity" if "affinity." in key else key for key in _schema_keys(SCHEMA)}
    used = {next((name for name in known if key == name or key.startswith(f"{name}.")), key) for key in _keys(VALUES)}
    assert used == known - {"global"}


SELF_EXPLANATORY = {  # Kubernetes' own words
    "image.trainer.pullPolicy", "training.priorityClassName", "nodeSelector", "tolerations", "affinity",
    "podAnnotations", "serviceAccount.create", "networkPolicy.enabled", "trainingNetworkPolicy.enabled",
    "monitoring.podMonitor.enabled", "monitoring.prometheusRule.enabled", "monitoring.scrapeInterval",
}  # fmt: skip


def test_every_value_has_an_explanation() -> None:
    from deploy.render import values

    flat = [value for _, section in values() for value in section]
    leaves = [value for value in flat if not any(other.path.startswith(f"{value.path}.") for other in flat)]
    assert {value.path for value in leaves if not value.comment} - {"resources.requests"} == SELF_EXPLANATORY


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicaCount": 2}, "at '': additional properties 'replicaCount' not allowed"),
        ({"image": {"tag": "1"}}, "at '/image': additional properties 'tag' not allowed"),
        ({"training": {"podTemplate": {}}}, "at '/training': additional properties 'podTemplate' not allowed"),
        ({"monitoring": {"podMonitor": {"on": True}}}, "at '/monitoring/podMonitor': additional properties 'on' not"),
        ({"monitoring": {"podMonitor": {"enabled": "yes"}}}, "value must be one of 'auto', true, false"),
        ({"uris": {"schemes": ["file"]}}, "value must be one of 's3', 'gs', 'az', 'hf', 'pvc'"),
        ({"concurrency": 0}, "at '/concurrency': minimum: got 0, want 1"),
        ({"image": {"operator": {"digest": "latest"}}}, "'latest' does not match pattern '^(sha256:[0-9a-f]{64})?$'"),
        ({"training": {"environment": {"A-B": "x"}}}, "'A-B' does not match pattern"),
        ({"training": {"labels": {"a b": "c"}}}, "at '/training/labels': additional properties 'a b' not allowed"),
        ({"training": {"labels": {"a": "b c"}}}, "at '/training/labels/a': 'b c' does not match pattern"),
        ({"training": {"nodeSelector": {"a": "b/c"}}}, "at '/training/nodeSelector/a': 'b/c' does not match pattern"),
        ({"training": {"annotations": {"a/b/c": "d"}}}, "at '/training/annotations': additional properties 'a/b/c' no"),
        ({"podLabels": {"A.b/c": "d"}}, "at '/podLabels': additional properties 'A.b/c' not allowed"),
        (
            {"training": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}},
            "at '/training/tolerations/0/value': value must be ''",
        ),
        ({"training": {"tolerations": [{"value": "b"}]}}, "at '/training/tolerations/0': missing property 'key'"),
        ({"tolerations": [{"key": "", "effect": "NoExecute"}]}, "at '/tolerations/0/key': minLength: got 0, want 1"),
        ({"tolerations": [{"key": "a b"}]}, "at '/tolerations/0/key': 'a b' does not match pattern"),
        ({"tolerations": [{"key": "a", "tolerationSeconds": 1}]}, "at '/tolerations/0': missing property 'effect'"),
        (
            {"tolerations": [{"key": "a", "effect": "NoSchedule", "tolerationSeconds": 1}]},
            "at '/tolerations/0/effect': value must be 'NoExecute'",
        ),
        *(
            ({"image": {"operator": {"repository": name}}}, f"at '/image/operator/repository': '{name}' does not match")
            for name in ("reg.example/op:1", "op:1", "reg.example/Op", "https://reg.example/op", f"op@{DIGEST}")
        ),
        (
            {"replicas": 2, "lease": {"enabled": False}},
            "replicas is 2 and lease.enabled is false: operators without a Lease disturb each other; "
            "set replicas to 1 or enable the lease",
        ),
        (
            {"lease": {"renewDeadlineSeconds": 15}},
            "lease.renewDeadlineSeconds is 15: it must be less than lease.durationSeconds (15)",
        ),
        (
            {"lease": {"retrySeconds": 10}},
            "lease.retrySeconds is 10: it must be less than lease.renewDeadlineSeconds (10)",
        ),
        ({"health": {"port": 8080}}, "metrics.port and health.port are both 8080: choose two ports"),
        (
            {"trainingNetworkPolicy": {"enabled": True}},
            "trainingNetworkPolicy.enabled needs trainingNetworkPolicy.namespaces: "
            "a policy protects the pods of one namespace",
        ),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name is needed with serviceAccount.create: false"),
        (
            {"monitoring": {"prometheusRule": {"disabled": ["NoSuchAlert"]}}},
            "monitoring.prometheusRule.disabled has NoSuchAlert, which is no alert of this chart; the alerts are "
            "FinetuneOperatorDown, ",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_a_sentence(values: Document, said: str) -> None:
    assert said in refusal(values)


def test_what_kubernetes_takes_is_not_refused_and_reaches_the_operator() -> None:
    found = settings_of(render({"training": TAKEN, "tolerations": TAKEN["tolerations"]}))
    assert {name: found["podDefaults"][name] for name in TAKEN} == TAKEN
    OperatorSettings.model_validate(found)


@pytest.mark.parametrize(
    "name", ["op", "localhost:5000/x", "registry.example:443/a/b_c/d__e/f--g.h", "me/op", "REG.example/op"]
)
def test_a_registry_may_have_a_port(name: str) -> None:
    documents = render({"image": {"trainer": {"repository": name}}})
    assert OperatorSettings.model_validate(settings_of(documents)).trainer_image == f"{name}:0.1.0"


def _setting_keys(model: type[BaseModel], path: str = "") -> set[str]:
    keys = set()
    for name, field in model.model_fields.items():
        key = f"{path}.{to_camel(name)}".lstrip(".")
        inner = field.annotation
        keys |= _setting_keys(inner, key) if isinstance(inner, type) and issubclass(inner, BaseModel) else {key}
    return keys


EVERY_SETTING: Document = {
    "image": {"trainer": {"repository": "registry.example/trainer", "digest": DIGEST, "pullPolicy": "Always"}},
    "namespaces": ["a", "b"],
    "trustRemoteCode": True,
    "collectiveTimeoutSeconds": 1200,
    "rendezvousTimeoutSeconds": 1201,
    "concurrency": 17,
    "uris": {"schemes": ["s3"], "hosts": ["*.models", "datasets"], "endpoints": ["http://minio:9000"]},
    "training": {
        "imagePullSecrets": ["registry"],
        "nodeSelector": {"gpu": "true"},
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        "priorityClassName": "training",
        "runtimeClassName": "nvidia",
        "labels": {"cost-center": "42"},
        "annotations": {"note": "<a & b>"},
        "environment": {"NCCL_DEBUG": "WARN"},
        "terminationGracePeriodSeconds": 121,
        "sharedMemory": "2Gi",
        "scratch": "200Gi",
    },
    "progress": {"intervalSeconds": 11, "timeoutSeconds": 4},
    "lease": {"name": "other", "durationSeconds": 16, "renewDeadlineSeconds": 11, "retrySeconds": 3},
    "metrics": {"port": 8082},
    "health": {"port": 8083},
    "log": {"format": "text", "level": "debug"},
}


def test_every_setting_of_the_operator_can_be_reached() -> None:
    settings = settings_of(render(EVERY_SETTING))
    open_maps = ("podDefaults.nodeSelector", "podDefaults.labels", "podDefaults.annotations", "podDefaults.environment")
    rendered = {next((name for name in open_maps if key.startswith(name)), key) for key in _keys(settings)}
    assert rendered == _setting_keys(OperatorSettings)
    training = dict(EVERY_SETTING["training"])
    secrets = training.pop("imagePullSecrets")
    assert settings == {
        **{
            key: EVERY_SETTING[key] for key in ("namespaces", "trustRemoteCode", "collectiveTimeoutSeconds", "progress")
        },
        **{key: EVERY_SETTING[key] for key in ("rendezvousTimeoutSeconds", "concurrency", "uris", "metrics", "health")},
        "trainerImage": f"registry.example/trainer@{DIGEST}",
        "trainerImagePullPolicy": "Always",
        "imagePullSecrets": secrets,
        "podDefaults": training,
        "lease": {**EVERY_SETTING["lease"], "enabled": True, "namespace": "finetune-system"},
        "log": {"format": "text", "level": "debug"},
    }
    assert OperatorSettings.model_validate(settings).pod_defaults.scratch == "200Gi"


def test_the_defaults_of_the_chart_are_the_defaults_of_the_operator() -> None:
    settings = OperatorSettings.model_validate(settings_of(render()))
    assert settings == OperatorSettings(
        trainer_image="registry.invalid/finetune-trainer:0.1.0",
        lease=settings.lease.model_copy(update={"namespace": "finetune-system"}),
    )
    assert settings.lease == type(settings.lease)(namespace="finetune-system")


def test_a_changed_setting_restarts_the_operator() -> None:
    def checksum(values: Document) -> str:
        template = one(render(values), "Deployment")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum({}) == checksum({"nodeSelector": {"a": "b"}})
    assert checksum({}) != checksum({"concurrency": 17})


def test_the_values_of_the_last_release_still_render() -> None:
    old = load_yaml((ROOT / "tests/golden/chart-values-0.1.0.yaml").read_text(encoding="utf-8"))
    kinds = {document["kind"] for document in render(old)}
    assert {"Deployment", "ConfigMap", "ClusterRole", "CustomResourceDefinition"} <= kinds


def notes(*arguments: str, namespace: str = "finetune-system") -> str:
    """What Helm prints after an installation."""
    done = helm("install", "finetune-operator", str(CHART), "--namespace", namespace, "--dry-run=client", *arguments)
    return done.stdout.split("NOTES:\n")[1]


def manifest_of(text: str) -> str:
    body = text.split("<<EOF\n")[1].split("    EOF")[0]
    lines = "\n".join(line[4:] for line in body.splitlines())
    return lines.replace("OWNER/MODEL", "owner/model").replace("BUCKET", "bucket")


def test_the_manifest_of_the_notes_is_a_good_one() -> None:
    from finetune_api.manifest import parse_manifest

    said = notes()
    assert said.startswith("finetune-operator 0.1.0 watches every namespace.\n")
    assert "helm test finetune-operator --namespace finetune-system" in said
    assert parse_manifest(manifest_of(said))[0].name == "first"


def test_the_notes_put_the_secret_and_the_job_where_the_operator_looks_for_them() -> None:
    from finetune_api.manifest import parse_manifest

    said = notes("--set", "namespaces={team-a,team-b}", namespace="ops")
    assert "helm test finetune-operator --namespace ops\n" in said
    assert "kubectl create secret generic bucket --namespace team-a --from-literal=" in said
    assert "kubectl get finetunejobs --namespace team-a --watch\n" in said
    assert parse_manifest(manifest_of(said))[0].namespace == "team-a"
    everywhere = [line for line in notes().splitlines() if line.startswith("    kubectl ")]
    assert [line for line in everywhere if "--namespace" in line] == []


def test_the_notes_tell_of_images_that_nobody_can_pull() -> None:
    own = ("image.operator.repository=localhost:5000/a", "image.trainer.repository=localhost:5000/b")
    told = "No registry has the images"
    assert told in notes()
    assert told in notes("--set", own[0])
    assert told not in notes("--set", ",".join(own))
