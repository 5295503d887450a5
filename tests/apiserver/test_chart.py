"""The chart meets a real API server: strict validation, Pod Security, install, upgrade, uninstall, real rights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.apiserver.kube import Document, Kube, Refused
from tests.apiserver.prometheus_operator import serve_prometheus_operators_kinds
from tests.apiserver.server import shared_server
from tests.chart import CHART, ROOT, helm, matrix, one, render

NAMES = matrix("first", "second")
NOT_SERVED = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}  # their CRDs are Prometheus Operator's


@pytest.mark.parametrize("name", NAMES)
def test_the_api_server_accepts_every_object_strictly_and_without_warnings(kube: Kube, name: str) -> None:
    values = matrix(kube.namespace, "default")[name]
    documents = [item for item in render(values, namespace=kube.namespace) if item["kind"] not in NOT_SERVED]
    account = one(documents, "Pod")["spec"]["serviceAccountName"]  # pods are refused without it, in a dry run too
    kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}})
    accepts(kube, documents)


def accepts(kube: Kube, documents: list[Document]) -> None:
    query = {"fieldManager": "test", "force": "true", "fieldValidation": "Strict", "dryRun": "All"}
    for document in documents:
        path = kube.path(
            document["kind"], document["metadata"]["name"], namespace=document["metadata"].get("namespace", "")
        )
        answer = kube.call("PATCH", path, document, content_type="application/apply-patch+yaml", **query)
        assert answer.code in {200, 201}, answer.body
        assert answer.warnings == []


def test_prometheus_operators_own_crds_accept_the_monitors_and_rules_that_appear_with_them(tmp_path: Path) -> None:
    with shared_server(tmp_path / "server", os.getpid()) as server, Kube(server, namespace="default") as kube:
        serve_prometheus_operators_kinds(kube)
        kubeconfig = server.write_kubeconfig(tmp_path / "kubeconfig")
        helm("install", "finetune-operator", str(CHART), "--kubeconfig", str(kubeconfig), "--take-ownership")
        names = {kind: [item["metadata"]["name"] for item in kube.list(kind)] for kind in sorted(NOT_SERVED)}
        assert names == {
            "PodMonitor": ["finetune-operator-training"],
            "PrometheusRule": ["finetune-operator"],
            "ServiceMonitor": ["finetune-operator"],
        }
        documents = render({}, "--api-versions", "monitoring.coreos.com/v1", namespace="default")
        accepts(kube, [document for document in documents if document["kind"] in NOT_SERVED])


@pytest.mark.parametrize("name", ["defaults", "two replicas", "placement"])
def test_a_restricted_namespace_accepts_the_operators_pod(kube: Kube, name: str) -> None:
    kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "finetune-operator"}})
    template = one(render(NAMES[name], namespace=kube.namespace), "Deployment")["spec"]["template"]
    metadata = {**template["metadata"], "name": "operator"}
    created = kube.create(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, dryRun="All"
    )
    assert created["spec"]["serviceAccountName"] == "finetune-operator"


def installed(kube: Kube) -> set[tuple[str, str]]:
    kinds = ("ServiceAccount", "ConfigMap", "Role", "RoleBinding", "Service", "Deployment")
    found = [item for kind in kinds for item in kube.list(kind)]
    return {
        (item["kind"], item["metadata"]["name"]) for item in found if item["metadata"]["name"].startswith("finetune")
    }


IN_THE_NAMESPACE = {
    ("ServiceAccount", "finetune-operator"),
    ("ConfigMap", "finetune-operator"),
    ("Role", "finetune-operator-lease"),
    ("RoleBinding", "finetune-operator-lease"),
    ("Service", "finetune-operator"),
    ("Deployment", "finetune-operator"),
}


def test_the_chart_installs_upgrades_from_the_last_release_and_leaves_the_jobs_when_it_goes(
    kube: Kube, kubeconfig: Path
) -> None:
    old_values = str(ROOT / "tests/golden/chart-values-0.1.0.yaml")
    reach = ("--kubeconfig", str(kubeconfig), "--namespace", kube.namespace)
    helm("install", "finetune-operator", str(CHART), *reach, "--values", old_values, "--take-ownership")
    assert installed(kube) == IN_THE_NAMESPACE
    before = kube.get("Deployment", "finetune-operator")
    job = kube.create(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "survivor"},
            "spec": {
                "model": {"uri": "s3://models/llama/"},
                "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
                "method": {"type": "LoRA"},
                "output": {"uri": "s3://adapters/"},
            },
        }
    )
    helm("upgrade", "finetune-operator", str(CHART), *reach, "--values", old_values, "--set", "concurrency=8")
    after = kube.get("Deployment", "finetune-operator")
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["selector"] == before["spec"]["selector"]
    assert json.loads(kube.get("ConfigMap", "finetune-operator")["data"]["config.json"])["concurrency"] == 8
    helm("uninstall", "finetune-operator", *reach)
    assert installed(kube) == set()
    assert kube.find("ClusterRole", f"{kube.namespace}:finetune-operator") is None
    assert kube.get("FineTuneJob", "survivor")["metadata"]["uid"] == job["metadata"]["uid"]


def test_a_wrong_object_is_refused_strictly(kube: Kube) -> None:
    """The dry runs above would notice."""
    deployment = one(render(namespace=kube.namespace), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(Refused) as refused:
        kube.apply(deployment, dryRun="All")
    assert "imagePullPolice" in refused.value.message


def operator_client(kube: Kube, namespaces: list[str]) -> Kube:
    """Somebody with the operator's ServiceAccount and the rights of the chart, really applied."""
    for document in render({"namespaces": namespaces}, namespace=kube.namespace):
        if document["kind"] in {"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}:
            kube.apply(document)
    client = Kube(kube.server, token=kube.account_token("finetune-operator"), namespace=kube.namespace)
    lease = ("patch", "coordination.k8s.io", "leases", kube.namespace, "finetune-operator")
    granted = [(*ALLOWED[0], kube.namespace), lease]  # of each Role one: the authorizer hears of them a moment later
    kube.wait(lambda: all(may(client, *asked) for asked in granted), "the rights are known")
    return client


def may(client: Kube, verb: str, group: str, resource: str, namespace: str, name: str = "") -> bool:
    resource, _, subresource = resource.partition("/")
    attributes = {
        "verb": verb,
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "namespace": namespace,
    }
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {**attributes, "name": name}},
    }
    answer = client.call("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool(answer.body["status"]["allowed"])


ALLOWED = [
    ("list", "finetune.dev", "finetunejobs"),
    ("patch", "finetune.dev", "finetunejobs/status"),
    ("create", "batch", "jobs"),
    ("watch", "batch", "jobs"),
    ("delete", "batch", "jobs"),
    ("create", "", "services"),
    ("create", "", "configmaps"),
    ("delete", "", "pods"),
    ("create", "events.k8s.io", "events"),
]
DENIED = [
    ("get", "", "secrets"),
    ("list", "", "secrets"),
    ("create", "", "pods"),
    ("create", "", "pods/exec"),
    ("get", "", "nodes"),
    ("create", "finetune.dev", "finetunejobs"),
    ("patch", "finetune.dev", "finetunejobs"),
    ("get", "", "configmaps"),
    ("create", "rbac.authorization.k8s.io", "rolebindings"),
    ("get", "coordination.k8s.io", "leases"),
]


def test_the_operators_account_may_do_what_it_needs_in_its_namespaces_and_nothing_elsewhere(kube: Kube) -> None:
    client = operator_client(kube, [kube.namespace])
    assert [asked for asked in ALLOWED if not may(client, *asked, kube.namespace)] == []
    assert [asked for asked in ALLOWED if may(client, *asked, "kube-system")] == []
    assert [asked for asked in DENIED if may(client, *asked, kube.namespace)] == []
    assert may(client, "patch", "coordination.k8s.io", "leases", kube.namespace, "finetune-operator")
    assert not may(client, "patch", "coordination.k8s.io", "leases", kube.namespace, "another")


def test_watching_the_whole_cluster_gives_the_same_rights_everywhere(kube: Kube) -> None:
    client = operator_client(kube, [])
    assert [asked for asked in ALLOWED if not may(client, *asked, "kube-system")] == []
    assert [asked for asked in DENIED if may(client, *asked, "kube-system")] == []


# ---- helm test: the script of its pod --------------------------------------------------------------------------------


@contextmanager
def pages(answers: dict[str, tuple[int, str]]) -> Iterator[str]:
    """An HTTP server with these pages; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, text = answers.get(self.path, (404, ""))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def smoke(kube: Kube, directory: Path, url: str) -> tuple[int, list[str]]:
    """Exit code and lines of the test pod's command, with the operator's own token."""
    operator_client(kube, [kube.namespace])
    (directory / "token").write_text(kube.account_token("finetune-operator"))
    (directory / "ca.crt").write_bytes(Path(kube.server.ca_file).read_bytes())
    host, port = kube.server.url.removeprefix("https://").rsplit(":", 1)
    command = one(render(), "Pod")["spec"]["containers"][0]["command"]
    environment = {
        "PATH": os.environ["PATH"],
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
        "SERVICE_ACCOUNT_DIRECTORY": str(directory),
        "CHECK_SECONDS": "0.5",
    }
    done = subprocess.run(
        [sys.executable, *command[1:3], url, url], env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines()


def test_helm_test_passes_when_the_operator_and_the_crd_are_there(kube: Kube, tmp_path: Path) -> None:
    with pages({"/readyz": (200, "ok"), "/metrics": (200, 'finetune_operator_build_info{version="0"} 1')}) as url:
        assert smoke(kube, tmp_path, url) == (
            0,
            [
                "ok: the operator is ready",
                "ok: the operator serves its metrics",
                "ok: the API server serves FineTuneJobs",
            ],
        )


def test_helm_test_names_every_check_that_failed(kube: Kube, tmp_path: Path) -> None:
    with pages({"/readyz": (503, "starting"), "/metrics": (200, "nothing")}) as url:
        code, lines = smoke(kube, tmp_path, url)
    assert code == 1
    assert lines == [
        "FAILED: operator is ready: HTTP Error 503: Service Unavailable",
        f"FAILED: operator has metrics: {url}/metrics has no finetune_operator_build_info",
        "ok: the API server serves FineTuneJobs",
    ]
