"""etcd, the API server, controller-manager, scheduler and DNS: host processes on the bridge's address."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deploy.local.cluster import processes
from deploy.local.cluster.api import Api
from deploy.local.cluster.layout import (
    API_PORT,
    COREDNS_READY,
    DNS_SERVICE,
    ETCD,
    ETCD_PEER,
    HOST,
    S3_PORT,
    SERVICE_NETWORK,
    Layout,
)

# A node is lost after 10 s of silence and its pods are evicted 5 s later (40 s and 300 s elsewhere): tests wait for it.
GRACE_SECONDS = 10
TOLERATION_SECONDS = 5
# The default of 20 requests per second keeps new nodes tainted for another 5 s.
_UNTHROTTLED = ("--kube-api-qps=500", "--kube-api-burst=1000")

AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "nonResourceURLs": ["/*"]},  # discovery and health
        # controllers of Kubernetes itself
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"], "verbs": ["get", "list", "watch"]},
        {
            "level": "None",
            "userGroups": ["system:serviceaccounts:kube-system", "system:nodes"],
            "resources": [{"group": "coordination.k8s.io"}, {"group": ""}, {"group": "events.k8s.io"}],
        },
        # every verb of every other service account: the operator's rules are compared with this
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None", "verbs": ["get", "list", "watch"]},
        {"level": "None", "resources": [{"group": "coordination.k8s.io"}]},
        {"level": "Metadata"},
    ],
}


def start_etcd(layout: Layout, program: Path) -> None:
    """Without fsync: the data dies with the cluster."""
    command = [program, "--name=local", f"--data-dir={layout.disk / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn"]
    command += [f"--listen-client-urls=http://{ETCD}", f"--advertise-client-urls=http://{ETCD}"]
    command += [f"--listen-peer-urls=http://{ETCD_PEER}", f"--initial-advertise-peer-urls=http://{ETCD_PEER}"]
    command += [f"--initial-cluster=local=http://{ETCD_PEER}", "--quota-backend-bytes=8589934592"]
    processes.start(layout, "etcd", command)


def start_api_server(layout: Layout, program: Path) -> None:
    """Returns at once; `Api.ready` says when it serves."""
    pki = layout.pki
    policy = layout.state / "audit-policy.json"
    policy.write_text(json.dumps(AUDIT_POLICY, indent=1))
    command = [
        program,
        f"--etcd-servers=http://{ETCD}",
        f"--bind-address={HOST}",
        f"--advertise-address={HOST}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        f"--client-ca-file={pki}/ca.crt",
        f"--tls-cert-file={pki}/apiserver.crt",
        f"--tls-private-key-file={pki}/apiserver.key",
        f"--kubelet-client-certificate={pki}/apiserver-kubelet.crt",
        f"--kubelet-client-key={pki}/apiserver-kubelet.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",  # nobody resolves n1 on the host
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/tokens.pub",
        f"--service-account-signing-key-file={pki}/tokens.key",
        f"--requestheader-client-ca-file={pki}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/front-proxy-client.crt",
        f"--proxy-client-key-file={pki}/front-proxy-client.key",
        "--enable-aggregator-routing=true",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--default-not-ready-toleration-seconds={TOLERATION_SECONDS}",
        f"--default-unreachable-toleration-seconds={TOLERATION_SECONDS}",
        f"--audit-policy-file={policy}",
        f"--audit-log-path={layout.audit_log}",
        "--audit-log-maxsize=4000",  # one file: tests read all of it
        "--profiling=false",
    ]
    processes.start(layout, "kube-apiserver", command)


def start_controllers(layout: Layout, controller_manager: Path, scheduler: Path) -> None:
    """After /readyz: earlier both give up, because the roles that they need are not there yet."""

    def identity(name: str) -> list[str]:
        flags = ("--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig")
        common = ["--leader-elect=false", "--bind-address=127.0.0.1", *_UNTHROTTLED]
        return [f"{flag}={layout.pki}/{name}.kubeconfig" for flag in flags] + common

    pki = layout.pki
    command = [controller_manager, *identity("controller-manager"), f"--root-ca-file={pki}/ca.crt"]
    command += [f"--service-account-private-key-file={pki}/tokens.key", "--use-service-account-credentials"]
    command += [f"--cluster-signing-cert-file={pki}/ca.crt", f"--cluster-signing-key-file={pki}/ca.key"]
    command += ["--allocate-node-cidrs=false", f"--flex-volume-plugin-dir={layout.state}/flex"]
    command += [f"--node-monitor-grace-period={GRACE_SECONDS}s", "--node-monitor-period=1s"]
    processes.start(layout, "kube-controller-manager", command)
    processes.start(layout, "kube-scheduler", [scheduler, *identity("scheduler")])


def start_dns(layout: Layout, program: Path) -> None:
    """On the host, so that no lost node takes names away. Two server blocks: `template` would answer everything."""
    corefile = layout.state / "Corefile"
    corefile.write_text(
        f"""cluster.local:53 in-addr.arpa:53 {{
  bind {HOST}
  errors
  ready {COREDNS_READY}
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {layout.pki}/coredns.kubeconfig
    ttl 1
  }}
}}
.:53 {{
  bind {HOST}
  template ANY ANY . {{
    rcode NXDOMAIN
  }}
}}
"""
    )
    processes.start(layout, "coredns", [program, "-conf", corefile], {**os.environ, "GOMEMLIMIT": "128MiB"})


def dns_ready() -> bool:
    """Whether CoreDNS has read Services and Pods."""
    try:
        with urllib.request.urlopen(f"http://{COREDNS_READY}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def apply_base_objects(api: Api) -> None:
    """Rights of kube-proxy, CoreDNS and Prometheus; Services whose servers run on the host."""
    _grant(api, "proxy", "system:kube-proxy", None)
    _grant(
        api,
        "coredns",
        "finetune-cluster:coredns",
        [
            _rule("", ["services", "pods", "namespaces"], ["list", "watch"]),
            _rule("discovery.k8s.io", ["endpointslices"], ["list", "watch"]),
        ],
    )
    _grant(
        api,
        "prometheus",
        "finetune-cluster:prometheus",
        [
            _rule("", ["pods", "nodes", "services", "endpoints", "nodes/metrics"], ["get", "list", "watch"]),
            {"nonResourceURLs": ["/metrics"], "verbs": ["get"]},
        ],
    )
    dns = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    _host_service(api, "kube-system", "kube-dns", dns, {"clusterIP": DNS_SERVICE})
    api.apply("/api/v1/namespaces/s3", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "s3"}})
    _host_service(api, "s3", "s3", [{"name": "s3", "port": S3_PORT, "protocol": "TCP"}], {})


def _rule(group: str, resources: list[str], verbs: list[str]) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


def _grant(api: Api, name: str, user: str, rules: list[dict[str, Any]] | None) -> None:
    """Without rules the user gets the built-in role of a node's proxy."""
    rbac = "rbac.authorization.k8s.io"
    full = f"finetune-cluster:{name}"
    role = full if rules else "system:node-proxier"
    kind = {"apiVersion": f"{rbac}/v1", "metadata": {"name": full}}
    path = f"/apis/{rbac}/v1"
    if rules:
        api.apply(f"{path}/clusterroles/{full}", kind | {"kind": "ClusterRole", "rules": rules})
    binding = {
        "kind": "ClusterRoleBinding",
        "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": rbac, "kind": "User", "name": user}],
    }
    api.apply(f"{path}/clusterrolebindings/{full}", kind | binding)


def _host_service(api: Api, namespace: str, name: str, ports: list[dict[str, Any]], spec: dict[str, Any]) -> None:
    metadata = {"name": name, "namespace": namespace}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec | {"ports": ports}}
    api.apply(f"/api/v1/namespaces/{namespace}/services/{name}", service)
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-host",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [HOST], "conditions": {"ready": True}}],
        "ports": ports,
    }
    api.apply(f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{name}-host", endpoints)
