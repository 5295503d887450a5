"""What the chart makes: rights, pod security, scope, switches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.chart import (
    CHART,
    DIGEST,
    EVERY_SWITCH,
    MONITORING,
    Document,
    alert_rules,
    helm,
    load_yaml,
    matrix,
    one,
    render,
    settings_of,
)

from finetune_api.crd import custom_resource_definition

RENDERINGS = matrix("team-a", "team-b")
CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace", "PriorityClass"}


def kinds(documents: list[Document]) -> list[tuple[str, str]]:
    return sorted((document["kind"], document["metadata"]["name"]) for document in documents)


def test_the_default_installation_is_this() -> None:
    assert kinds(render()) == [
        ("ClusterRole", "finetune-system:finetune-operator"),
        ("ClusterRole", "finetune-system:finetune-operator:edit"),
        ("ClusterRole", "finetune-system:finetune-operator:view"),
        ("ClusterRoleBinding", "finetune-system:finetune-operator"),
        ("ConfigMap", "finetune-operator"),
        ("CustomResourceDefinition", "finetunejobs.finetune.dev"),
        ("Deployment", "finetune-operator"),
        ("Pod", "finetune-operator-test"),
        ("Role", "finetune-operator-lease"),
        ("RoleBinding", "finetune-operator-lease"),
        ("Service", "finetune-operator"),
        ("ServiceAccount", "finetune-operator"),
    ]


def test_with_a_list_of_namespaces_nothing_but_the_crd_is_cluster_scoped() -> None:
    documents = render({"namespaces": ["team-a", "team-b"]})
    assert {d["kind"] for d in documents} & CLUSTER_SCOPED == {"CustomResourceDefinition"}
    roles = sorted((d["metadata"]["namespace"], d["metadata"]["name"]) for d in documents if d["kind"] == "Role")
    assert roles == [
        ("finetune-system", "finetune-operator-lease"),
        ("team-a", "finetune-operator"),
        ("team-b", "finetune-operator"),
    ]
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] != "CustomResourceDefinition"} == {
        "finetune-system", "team-a", "team-b",
    }  # fmt: skip


def test_the_operator_may_do_exactly_this() -> None:
    documents = render()
    rules = one(documents, "ClusterRole", "finetune-system:finetune-operator")["rules"]
    granted = {
        f"{group or 'core'}/{resource}": rule["verbs"]
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert granted == {
        "finetune.dev/finetunejobs": ["list", "watch", "delete"],
        "finetune.dev/finetunejobs/status": ["patch"],
        "batch/jobs": ["get", "list", "watch", "create", "patch", "delete"],
        "core/services": ["create", "patch"],
        "core/configmaps": ["create", "patch"],
        "core/pods": ["list", "delete"],
        "core/pods/status": ["patch"],
        "core/events": ["list"],
        "events.k8s.io/events": ["create"],
    }
    assert one(render({"namespaces": ["team-a"]}), "Role", "finetune-operator")["rules"] == rules
    assert one(documents, "Role", "finetune-operator-lease")["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": ["finetune-operator"],
            "verbs": ["get", "patch"],
        },
    ]


@pytest.mark.parametrize("name", RENDERINGS)
def test_no_rule_has_a_wildcard_or_touches_secrets_nodes_or_rights(name: str) -> None:
    for document in render(RENDERINGS[name]):
        for rule in document.get("rules", ()):
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not words & {"*", "secrets", "nodes", "serviceaccounts", "escalate", "bind", "impersonate"}
            assert "rbac.authorization.k8s.io" not in words


def pods_of(documents: list[Document]) -> list[Document]:
    specs = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"]
    return specs + [d["spec"] for d in documents if d["kind"] == "Pod"]


@pytest.mark.parametrize("name", RENDERINGS)
def test_no_container_runs_as_root_writes_its_image_or_gains_rights(name: str) -> None:
    pods = pods_of(render(RENDERINGS[name]))
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {next(iter(volume.keys() - {"name"})) for volume in pod.get("volumes", ())} <= {"configMap", "emptyDir"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["command"][0] == "python"


def test_digests_win_over_tags() -> None:
    values = {"image": {"operator": {"tag": "v1", "digest": DIGEST}, "trainer": {"tag": "v1"}}}
    assert [pod["containers"][0]["image"] for pod in pods_of(render(values))] == [
        f"registry.invalid/finetune-operator@{DIGEST}"
    ] * 2


def test_pull_secrets_go_to_the_operator_and_its_test_pod() -> None:
    for pod in pods_of(render({"imagePullSecrets": ["one", "two"]})):
        assert pod["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]


def test_with_the_lease_the_new_pod_stands_by_before_the_old_one_goes_and_without_it_never_two_run() -> None:
    assert one(render(), "Deployment")["spec"]["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }
    assert one(render({"lease": {"enabled": False}}), "Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_two_replicas_spread_over_nodes_and_keep_one_during_a_drain() -> None:
    documents = render({"replicas": 2})
    labels = one(documents, "Deployment")["spec"]["selector"]["matchLabels"]
    assert one(documents, "Deployment")["spec"]["template"]["spec"]["topologySpreadConstraints"] == [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels},
        }
    ]
    assert one(documents, "PodDisruptionBudget")["spec"] == {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    assert "PodDisruptionBudget" not in {d["kind"] for d in render()}


@pytest.mark.parametrize("name", RENDERINGS)
def test_selectors_match_the_operators_pod_and_not_the_test_pod(name: str) -> None:
    documents = render(RENDERINGS[name])
    template = one(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    test_pod = one(documents, "Pod")["metadata"]["labels"]
    selectors = [
        one(documents, "Service")["spec"]["selector"],
        one(documents, "Deployment")["spec"]["selector"]["matchLabels"],
    ]
    selectors += [d["spec"]["podSelector"]["matchLabels"] for d in documents if d["kind"] == "NetworkPolicy"][-1:]
    for selector in selectors:
        assert selector.items() <= template.items()
        assert not selector.items() <= test_pod.items()


def test_labels_of_the_user_never_replace_those_of_the_chart() -> None:
    template = one(render({"podLabels": {"app.kubernetes.io/component": "x", "team": "ml"}}), "Deployment")["spec"][
        "template"
    ]
    assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "operator"
    assert template["metadata"]["labels"]["team"] == "ml"


def test_the_crd_is_the_generated_one_and_is_kept_unless_told_otherwise() -> None:
    def crd(values: Document) -> Document:
        return one(render(values), "CustomResourceDefinition")

    assert crd({})["spec"] == custom_resource_definition()["spec"]
    assert crd({})["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "annotations" not in crd({"crds": {"keep": False}})["metadata"]
    assert crd({"crds": {"annotations": {"a": "b"}}})["metadata"]["annotations"] == {
        "a": "b",
        "helm.sh/resource-policy": "keep",
    }
    assert "CustomResourceDefinition" not in {d["kind"] for d in render({"crds": {"install": False}})}


def test_training_pods_may_only_be_reached_by_each_other_the_operator_and_prometheus() -> None:
    values = {"trainingNetworkPolicy": {"enabled": True, "namespaces": ["team-a"], "metricsFrom": ["monitoring"]}}
    documents = render(values)
    training = {"app.kubernetes.io/name": "finetune-job", "app.kubernetes.io/managed-by": "finetune-operator"}
    policy = one(documents, "NetworkPolicy")
    operator = one(documents, "Service")["spec"]["selector"]
    assert policy["metadata"]["namespace"] == "team-a"
    assert policy["spec"] == {
        "podSelector": {"matchLabels": training},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": training}}]},
            {
                "ports": [{"port": "metrics", "protocol": "TCP"}],
                "from": [
                    {
                        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "finetune-system"}},
                        "podSelector": {"matchLabels": operator},
                    },
                    {"namespaceSelector": {"matchExpressions": [
                        {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["monitoring"]}
                    ]}},
                ],
            },
        ],
        "egress": [
            {"to": [{"namespaceSelector": {}}]},
            {"to": [
                {"ipBlock": {
                    "cidr": "0.0.0.0/0", "except": ["169.254.169.254/32", "168.63.129.16/32", "100.100.100.200/32"],
                }},
                {"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::254/128", "fd20:ce::254/128"]}},
            ]},
        ],
    }  # fmt: skip


def test_the_operator_reaches_the_api_server_names_and_the_progress_of_its_pods_only() -> None:
    values = {"namespaces": ["team-a"], "networkPolicy": {"enabled": True, "apiServer": {"cidrs": ["10.0.0.1/32"]}}}
    egress = one(render(values), "NetworkPolicy")["spec"]["egress"]
    assert egress == [
        {
            "ports": [{"port": 443, "protocol": "TCP"}, {"port": 6443, "protocol": "TCP"}],
            "to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
        },
        {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
        {
            "ports": [{"port": 9464, "protocol": "TCP"}],
            "to": [{
                "namespaceSelector": {"matchExpressions": [
                    {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["team-a"]}
                ]},
                "podSelector": {"matchLabels": {
                    "app.kubernetes.io/name": "finetune-job", "app.kubernetes.io/managed-by": "finetune-operator",
                }},
            }],
        },
    ]  # fmt: skip


def monitoring_kinds(*arguments: str, **switches: Any) -> set[tuple[str, str]]:
    values = {"monitoring": {name: {"enabled": value} for name, value in switches.items()}}
    wanted = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    return {(kind, name) for kind, name in kinds(render(values, *arguments)) if kind in wanted or "dashboard" in name}


EVERYTHING = {
    ("ServiceMonitor", "finetune-operator"),
    ("PodMonitor", "finetune-operator-training"),
    ("PrometheusRule", "finetune-operator"),
    ("ConfigMap", "finetune-operator-dashboard"),
}
ON = dict.fromkeys(("serviceMonitor", "podMonitor", "prometheusRule", "dashboard"), True)


def test_monitoring_objects_appear_where_their_api_is_served_or_where_they_are_asked_for() -> None:
    served = ("--api-versions", MONITORING)
    assert monitoring_kinds() == set()
    assert monitoring_kinds(*served) == EVERYTHING
    assert monitoring_kinds(**ON) == EVERYTHING
    assert monitoring_kinds(*served, **dict.fromkeys(ON, False)) == set()
    assert monitoring_kinds(*served, podMonitor=False, dashboard=False) == {
        ("ServiceMonitor", "finetune-operator"),
        ("PrometheusRule", "finetune-operator"),
    }


def test_monitors_select_the_operators_service_and_the_training_pods() -> None:
    documents = render({"monitoring": {"labels": {"release": "prometheus"}}}, "--api-versions", MONITORING)
    service, monitor = one(documents, "Service"), one(documents, "ServiceMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"] == {
        "namespaceSelector": {"matchNames": ["finetune-system"]},
        "selector": {"matchLabels": service["spec"]["selector"]},
        "endpoints": [{"port": "metrics", "path": "/metrics", "interval": "30s"}],
    }
    assert service["spec"]["selector"].items() <= service["metadata"]["labels"].items()
    assert one(documents, "PodMonitor")["spec"] == {
        "namespaceSelector": {"any": True},
        "selector": {"matchLabels": {
            "app.kubernetes.io/name": "finetune-job", "app.kubernetes.io/managed-by": "finetune-operator",
        }},
        "podMetricsEndpoints": [{
            "port": "metrics",
            "path": "/metrics",
            "interval": "30s",
            "relabelings": [
                {"sourceLabels": ["__meta_kubernetes_pod_label_finetune_dev_job"], "targetLabel": "finetune_job"},
                {
                    "sourceLabels": ["__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"],
                    "targetLabel": "finetune_node",
                },
            ],
        }],
    }  # fmt: skip
    namespaced = render({"namespaces": ["team-a"]}, "--api-versions", MONITORING)
    assert one(namespaced, "PodMonitor")["spec"]["namespaceSelector"] == {"matchNames": ["team-a"]}


def test_the_rules_reach_prometheus_as_they_are_written_but_for_what_the_administrator_changed() -> None:
    def rules(settings: Document) -> list[Document]:
        documents = render({"monitoring": {"prometheusRule": settings}}, "--api-versions", MONITORING)
        return [rule for group in one(documents, "PrometheusRule")["spec"]["groups"] for rule in group["rules"]]

    written = list(alert_rules())
    assert rules({}) == written
    changed = rules({"labels": {"team": "ml"}, "disabled": ["FineTuneJobCheckpointTooOld"]})
    assert changed == [
        {**rule, "labels": {**rule["labels"], "team": "ml"}}
        for rule in written
        if rule["alert"] != "FineTuneJobCheckpointTooOld"
    ]


def test_the_chart_refuses_a_kubernetes_that_is_too_old() -> None:
    done = helm("template", "x", str(CHART), "--kube-version", "1.28.15", check=False)
    assert "chart requires kubeVersion: >=1.29.0-0 which is incompatible with Kubernetes v1.28.15" in done.stderr


def test_two_releases_share_nothing_but_what_they_must() -> None:
    first = kinds(render(namespace="one"))
    second = kinds(render({"crds": {"install": False}}, namespace="two"))
    shared = {entry for entry in first if entry[0] in CLUSTER_SCOPED} & {e for e in second if e[0] in CLUSTER_SCOPED}
    assert shared == set()


def test_two_releases_in_one_namespace_share_nothing_not_even_the_lease() -> None:
    team_a, team_b = (
        render({"namespaces": [name], "crds": {"install": False}}, release=name) for name in ("team-a", "team-b")
    )
    assert set(kinds(team_a)) & set(kinds(team_b)) == set()
    for documents, name in ((team_a, "team-a-finetune-operator"), (team_b, "team-b-finetune-operator")):
        assert settings_of(documents, name)["lease"]["name"] == name
        assert one(documents, "Role", f"{name}-lease")["rules"][1]["resourceNames"] == [name]


def test_a_lease_that_the_values_name_is_the_one_that_the_operator_asks_for_and_may_have() -> None:
    documents = render({"lease": {"name": "shared"}})
    assert settings_of(documents)["lease"]["name"] == "shared"
    assert one(documents, "Role", "finetune-operator-lease")["rules"][1]["resourceNames"] == ["shared"]


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, str(key)))


@pytest.mark.parametrize("word", ["123", "true", "null", "1e3"])
def test_names_that_yaml_takes_for_something_else_stay_strings(word: str) -> None:
    letters = word if word[0].isalpha() else "on"
    values = {
        "nameOverride": word, "fullnameOverride": letters, "priorityClassName": word, "replicas": 2,
        "serviceAccount": {"name": word}, "networkPolicy": {"enabled": True}, "monitoring": EVERY_SWITCH,
        "crds": {"install": False},
    }  # fmt: skip
    documents = render(values, release=word)
    names = {"name", "priorityClassName", "serviceAccountName"}
    maps = {"labels", "annotations", "matchLabels", "selector"}
    for document in documents:
        for path, leaf in leaves(document):
            if path[-1] in names or (path[-2:-1] and path[-2] in maps):
                assert isinstance(leaf, str), (document["kind"], path, leaf)
    pod = one(documents, "Deployment", letters)["spec"]["template"]
    assert pod["spec"]["priorityClassName"] == pod["spec"]["serviceAccountName"] == word
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == word
    assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == word


def test_install_yaml_and_the_other_rendered_files_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    from deploy import render as rendered

    one(render(), "Deployment")  # there is a Helm: nothing below is left out
    assert rendered.main(["--check"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().err == ""


def test_install_yaml_is_the_default_installation_without_what_only_helm_reads() -> None:
    from deploy.render import ROOT
    from ruamel.yaml import YAML

    text = (ROOT / "deploy/install.yaml").read_text(encoding="utf-8")
    assert "helm" not in text.lower().replace("edit the chart instead", "").split("apiversion", 1)[1]
    installed = list(YAML(typ="safe").load_all(text))
    assert kinds(installed) == sorted([
        ("Namespace", "finetune-system"), *(entry for entry in kinds(render()) if entry[0] != "Pod")
    ])  # fmt: skip
    assert (
        load_yaml((ROOT / "crds/finetune.dev_finetunejobs.yaml").read_text(encoding="utf-8"))["spec"]
        == one(installed, "CustomResourceDefinition")["spec"]
    )
