"""The local cluster is a real Kubernetes: pods, names, faults; and nothing of it stays."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from deploy.local.cluster import network, tools
from deploy.local.cluster.__main__ import main
from deploy.local.cluster.layout import API_SERVICE, DNS_SERVICE, ClusterError
from tests.cluster.cluster import LocalCluster, wait_for

ROOT = Path(__file__).parents[2]


def pod(name: str, image: str, *args: str, node: str | None = None, **extra: Any) -> dict[str, Any]:
    container = {
        "name": "probe",
        "image": image,
        "imagePullPolicy": "Never",
        "args": list(args),
        "ports": [{"name": "metrics", "containerPort": 9000}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "hostname": name,
        "subdomain": "gang",
        "terminationGracePeriodSeconds": 0,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    if node:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    labels = {"gang": "yes", "app.kubernetes.io/managed-by": "finetune-operator"}
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec | extra}


GANG = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "gang"},
    "spec": {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"gang": "yes"},
        "ports": [{"name": "http", "port": 8000}],
    },
}


def start_gang(running: LocalCluster, namespace: str, image: str) -> None:
    pods = [pod(f"gang-{index}", image, "serve", node=f"n{index + 1}") for index in range(2)]
    running.apply(GANG, *pods, namespace=namespace)
    wait_for(lambda: phases(running, namespace) == {"gang-0": "Running", "gang-1": "Running"}, 120, "no pods run")


def phases(running: LocalCluster, namespace: str) -> dict[str, str]:
    return {item["metadata"]["name"]: item["status"]["phase"] for item in running.list("pods", namespace)}


def ask(running: LocalCluster, namespace: str, source: str, *targets: str) -> str:
    return running.kubectl("exec", source, "--namespace", namespace, "--", "/probe", "ask", "45", *targets)


class TestRunning:
    def test_two_nodes_are_ready_and_run_the_version_that_was_asked_for(self, local_cluster: LocalCluster) -> None:
        nodes = local_cluster.list("nodes")
        assert {item["metadata"]["name"]: item["status"]["nodeInfo"]["kubeletVersion"] for item in nodes} == {
            "n1": "v1.36.3",
            "n2": "v1.36.3",
        }
        assert all(local_cluster.node_ready(name) for name in ("n1", "n2"))
        assert [item["spec"].get("taints") for item in nodes] == [None, None]

    def test_every_node_leads_to_the_api_server_and_to_names_and_to_no_service_that_is_not(
        self, local_cluster: LocalCluster
    ) -> None:
        for node in local_cluster.layout.nodes:
            assert network.serves(node, API_SERVICE)
            assert network.serves(node, DNS_SERVICE)
            assert not network.serves(node, "10.96.77.77")

    def test_pods_on_both_nodes_find_each_other_by_name(
        self, local_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        start_gang(local_cluster, namespace, probe_image)
        for source in ("gang-0", "gang-1"):
            answer = ask(local_cluster, namespace, source, "gang-0.gang", "gang-1.gang")
            assert answer == "gang-0.gang gang-0\ngang-1.gang gang-1\n"
        addresses = {item["status"]["podIP"].rsplit(".", 1)[0] for item in local_cluster.list("pods", namespace)}
        assert addresses == {"10.232.1", "10.232.2"}

    def test_pods_reach_object_storage_at_the_address_that_the_host_uses(
        self, local_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        urls = ["http://10.231.0.1:7070/healthz", "http://s3.s3.svc:7070/healthz"]
        local_cluster.apply(pod("asks", probe_image, "get", "20", *urls), namespace=namespace)
        wait_for(lambda: phases(local_cluster, namespace) == {"asks": "Succeeded"}, 120, "the pod does not end")
        assert local_cluster.kubectl("logs", "asks", "--namespace", namespace) == "200\n200\n"
        assert local_cluster.s3().environment["AWS_ENDPOINT_URL"] == "http://10.231.0.1:7070"
        assert local_cluster.layout.s3_environment.stat().st_mode & 0o777 == 0o600

    def test_prometheus_finds_pods_that_carry_our_name(
        self, local_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        local_cluster.apply(pod("measured", probe_image, "serve"), namespace=namespace)
        expression = f'probe_up{{namespace="{namespace}",pod="measured"}}'
        found = wait_for(lambda: local_cluster.query(expression), 120, "Prometheus has no sample")
        assert found[0]["value"][1] == "1"
        assert found[0]["metric"]["container"] == "probe"

    def test_a_restricted_namespace_refuses_a_root_pod(
        self, local_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        bad = pod("root", probe_image, "serve", securityContext={"runAsUser": 0})
        with pytest.raises(AssertionError, match='violates PodSecurity "restricted:latest"'):
            local_cluster.apply(bad, namespace=namespace)

    def test_the_audit_log_holds_every_verb_of_a_service_account(
        self, local_cluster: LocalCluster, namespace: str
    ) -> None:
        user = f"system:serviceaccount:{namespace}:default"
        words = ["auth", "can-i", "list", "pods", "--namespace", namespace]
        token = local_cluster.kubectl("create", "token", "default", "--namespace", namespace).strip()
        config = local_cluster.layout.pki / "ca.crt"
        direct = ["--server=https://10.231.0.1:6443", f"--certificate-authority={config}", f"--token={token}"]
        environment = os.environ | {"KUBECONFIG": "/dev/null"}
        kubectl = str(tools.program("kubectl"))
        subprocess.run([kubectl, *direct, *words], env=environment, capture_output=True, check=False)
        listing = [kubectl, *direct, "get", "pods", "--namespace", namespace]
        refused = subprocess.run(listing, env=environment, capture_output=True, text=True, check=False)
        assert "is forbidden" in refused.stderr
        expected = {("list", "pods"), ("create", "selfsubjectaccessreviews")}

        def written() -> bool:
            events = local_cluster.audit(user)
            return expected <= {(event["verb"], event["objectRef"]["resource"]) for event in events}

        wait_for(written, 10, "the audit log lacks a request")  # it is written after the answer


class TestFaults:
    def test_a_node_without_power_is_lost_and_comes_back(
        self, breakable_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        start_gang(breakable_cluster, namespace, probe_image)
        began = time.monotonic()
        breakable_cluster.power_off("n2")
        breakable_cluster.wait_until_node("n2", ready=False)
        assert time.monotonic() - began > 3, "nobody said good-bye: it is missed by its lease"
        breakable_cluster.boot("n2")
        breakable_cluster.wait_until_node("n2", ready=True)
        assert breakable_cluster.run_on("n2", "hostname") == "n2\n"
        breakable_cluster.apply(pod("after", probe_image, "serve", node="n2"), namespace=namespace)
        wait_for(lambda: phases(breakable_cluster, namespace).get("after") == "Running", 120, "no pod after boot")
        assert ask(breakable_cluster, namespace, "gang-0", "after.gang") == "after.gang after\n"

    def test_a_partition_heals_and_pods_live_through_it(
        self, breakable_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        long = [{"key": f"node.kubernetes.io/{why}", "operator": "Exists"} for why in ("unreachable", "not-ready")]
        survivor = pod("survivor", probe_image, "serve", node="n2", tolerations=long)
        breakable_cluster.apply(GANG, survivor, namespace=namespace)
        wait_for(lambda: phases(breakable_cluster, namespace) == {"survivor": "Running"}, 120, "the pod does not run")
        before = breakable_cluster.list("pods", namespace)[0]["status"]["containerStatuses"][0]["containerID"]
        breakable_cluster.cut("n2")
        breakable_cluster.wait_until_node("n2", ready=False)
        breakable_cluster.heal("n2")
        breakable_cluster.wait_until_node("n2", ready=True)
        after = breakable_cluster.list("pods", namespace)[0]["status"]["containerStatuses"][0]
        assert (after["containerID"], after["restartCount"]) == (before, 0)
        assert ask(breakable_cluster, namespace, "survivor", "survivor.gang") == "survivor.gang survivor\n"

    def test_pods_live_on_without_their_kubelet(
        self, breakable_cluster: LocalCluster, namespace: str, probe_image: str
    ) -> None:
        breakable_cluster.apply(pod("alone", probe_image, "serve", node="n2"), namespace=namespace)
        wait_for(lambda: phases(breakable_cluster, namespace) == {"alone": "Running"}, 120, "the pod does not run")
        address = breakable_cluster.list("pods", namespace)[0]["status"]["podIP"]
        breakable_cluster.kill_component("n2", "kubelet")
        breakable_cluster.wait_until_node("n2", ready=False)
        assert breakable_cluster.run_on("n1", "curl", "-sf", f"http://{address}:8000") == "alone"
        breakable_cluster.start_component("n2", "kubelet")
        breakable_cluster.wait_until_node("n2", ready=True)

    def test_object_storage_comes_back_with_its_objects_and_credentials(self, breakable_cluster: LocalCluster) -> None:
        before = breakable_cluster.s3()
        breakable_cluster.s3().create_bucket("kept")
        breakable_cluster.stop_s3()
        with pytest.raises(ClusterError, match=r"^The S3 server does not run\.$"):
            breakable_cluster.stop_s3()
        breakable_cluster.start_s3()
        after = breakable_cluster.s3()
        assert (after.secret_key, after.endpoint) == (before.secret_key, before.endpoint)
        assert after.object_file("kept", "").is_dir()

    def test_a_node_that_is_off_says_how_to_boot_it(self, breakable_cluster: LocalCluster) -> None:
        breakable_cluster.crash("n2")
        with pytest.raises(ClusterError, match=r"^Node n2 is off; boot it with `node boot n2`\.$"):
            breakable_cluster.run_on("n2", "true")


class TestSentences:
    def test_a_second_cluster_is_refused(self, local_cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["up"]) == 1
        expected = (
            f"A local cluster runs (state {local_cluster.layout.state}); stop it first with `make cluster-down`.\n"
        )
        assert capsys.readouterr().err == expected

    def test_an_unknown_node_is_named_with_the_known_ones(
        self, local_cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["node", "off", "n7"]) == 1
        assert capsys.readouterr().err == "The cluster has no node 'n7'; it has n1, n2.\n"

    def test_too_many_nodes_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["up", "--nodes", "10"]) == 1
        assert capsys.readouterr().err == "nodes: 10 is not possible; the local cluster has 1 to 9.\n"

    def test_a_tool_that_cannot_be_built_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
        with pytest.raises(ClusterError) as caught:
            tools.program("etcd")
        assert str(caught.value) == (
            "etcd v3.6.16 must be built and 'go' is not on PATH; install Go >= 1.26 "
            "or put etcd v3.6.16 on PATH or into $KUBEBUILDER_ASSETS."
        )

    def test_an_installed_tool_is_taken_only_with_the_same_version(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path / "cache"))
        for name, version in (("old", "3.4.23"), ("same", "3.6.16")):
            (tmp_path / name).mkdir()
            program = tmp_path / name / "etcd"
            program.write_text(f"#!/bin/sh\necho etcd Version: {version}\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "old"))
        monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "same"))
        assert tools.program("etcd") == tmp_path / "same" / "etcd"
        monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path / "old"))
        with pytest.raises(ClusterError, match=r"^etcd v3\.6\.16 must be built"):
            tools.program("etcd")
