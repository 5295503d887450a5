"""A whole control plane on this machine with fake nodes: everything of Kubernetes but kubelets.

kwok plays the kubelets: a pod that the scheduler has placed runs at once, until somebody deletes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import yaml
from tests.apiserver.kube import Kube
from tests.apiserver.server import Keeper, RunningServer

POD_NETWORK = "10.64.0.0/16"  # of the fake pods; inside the measurement's own network namespace
NODES = 20
OPERATOR_NAMESPACE = "finetune-system"
OPERATOR = f"system:serviceaccount:{OPERATOR_NAMESPACE}:finetune-operator"  # its name in the audit log
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
_QUICK = ("--kube-api-qps=500", "--kube-api-burst=1000")  # the default, 20 requests/s, would be what is measured
_READY_SECONDS = 60


class Plane(Keeper):
    """etcd and kube-apiserver; with ``nodes`` also controller manager, scheduler and fake nodes.

    All of them die with the thread that enters, however it ends.
    """

    def __init__(self, parent: Path, *, nodes: int = NODES) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="plane-", dir=parent)))
        self._nodes = nodes
        self.server: RunningServer

    def __enter__(self) -> Plane:
        try:
            self.server = RunningServer(self.directory, self.start(controllers=False), self.token)
            self.kube = Kube(self.server)
            self._name_the_operator()
            if self._nodes:
                self._start_the_rest()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def make_namespace(self, name: str) -> None:
        """A restricted namespace in which pods may be made at once."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        if self._nodes:
            self.kube.wait(lambda: self.kube.find("ServiceAccount", "default", namespace=name), "accounts are made")

    def cpu_seconds(self) -> dict[str, float]:
        """What each process has burnt so far, user and system."""
        spent = {}
        for name, process in self.processes:
            times = psutil.Process(process.pid).cpu_times()
            spent[name] = times.user + times.system
        return spent

    def operator_kubeconfig(self) -> Path:
        """For the operator's own identity, so that the audit log tells its requests from all others."""
        token = self.kube.account_token("finetune-operator", namespace=OPERATOR_NAMESPACE)
        return self.server.write_kubeconfig(self.directory / "operator.kubeconfig", token=token)

    def _name_the_operator(self) -> None:
        self.kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR_NAMESPACE}})
        account = {"name": "finetune-operator", "namespace": OPERATOR_NAMESPACE}
        self.kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account})
        self.kube.create(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": "finetune-operator"},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                "subjects": [{"kind": "ServiceAccount", **account}],
            }
        )

    def _start_the_rest(self) -> None:
        kubeconfig = self.server.kubeconfig
        identity = [f"--{prefix}kubeconfig={kubeconfig}" for prefix in ("", "authentication-", "authorization-")]
        own = ["--leader-elect=false", *_QUICK]
        self._run("kube-controller-manager", [*identity, *own, "--secure-port=0"])
        self._run("kube-scheduler", [*identity, *own, "--secure-port=0"])
        stages = self.directory / "stages.yaml"
        stages.write_text(yaml.safe_dump_all(_STAGES))
        self._run("kwok", _kwok_arguments(kubeconfig, stages))
        for number in range(self._nodes):
            self._make_node(f"fake-{number}")
        self.kube.wait(self._all_schedulable, "all fake nodes take pods", _READY_SECONDS)

    def _make_node(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        self.kube.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})

    def _all_schedulable(self) -> bool:
        nodes = self.kube.call("GET", "/api/v1/nodes").body["items"]
        return len(nodes) == self._nodes and all(
            "taints" not in node["spec"] and "nvidia.com/gpu" in node["status"].get("allocatable", {}) for node in nodes
        )


def _kwok_arguments(kubeconfig: Path, stages: Path) -> Sequence[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        "--manage-all-nodes=true",
        f"--config={stages}",
        f"--cidr={POD_NETWORK}",
        "--node-lease-duration-seconds=40",
    ]


def _stage(name: str, kind: str, expressions: list[Mapping[str, Any]], following: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": expressions},
            "next": following,
        },
    }


_NOT_READY = {
    "key": '.status.conditions.[] | select( .type == "Ready" ) | .status',
    "operator": "NotIn",
    "values": ["True"],
}
_NODE_STATUS = """
conditions:
- type: Ready
  status: "True"
  reason: Fake
  lastHeartbeatTime: {{ Now | Quote }}
  lastTransitionTime: {{ Now | Quote }}
addresses: [{type: Hostname, address: {{ .metadata.name | Quote }}}]
capacity: {cpu: 4k, memory: 64Ti, ephemeral-storage: 64Ti, pods: "1000", nvidia.com/gpu: "1000"}
allocatable: {cpu: 4k, memory: 64Ti, ephemeral-storage: 64Ti, pods: "1000", nvidia.com/gpu: "1000"}
phase: Running
"""
_POD_STATUS = """
{{ $now := Now | Quote }}
{{ $addresses := PodIPsWith .spec.nodeName false .metadata.uid .metadata.name .metadata.namespace }}
phase: Running
startTime: {{ $now }}
podIP: {{ index $addresses 0 | Quote }}
podIPs: [{ip: {{ index $addresses 0 | Quote }}}]
conditions:
- {type: Initialized, status: "True", lastTransitionTime: {{ $now }}}
- {type: ContainersReady, status: "True", lastTransitionTime: {{ $now }}}
- {type: Ready, status: "True", lastTransitionTime: {{ $now }}}
containerStatuses:
{{ range .spec.containers }}
- name: {{ .name | Quote }}
  image: {{ .image | Quote }}
  imageID: ""
  ready: true
  started: true
  restartCount: 0
  state: {running: {startedAt: {{ $now }}}}
{{ end }}
"""
_STAGES = [
    _stage("node-ready", "Node", [_NOT_READY], {"statusTemplate": _NODE_STATUS}),
    _stage(
        "pod-runs",
        "Pod",
        [
            {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"},
            {"key": ".status.phase", "operator": "In", "values": ["Pending"]},
            _NOT_READY,
        ],
        {"statusTemplate": _POD_STATUS},
    ),
    _stage("pod-gone", "Pod", [{"key": ".metadata.deletionTimestamp", "operator": "Exists"}], {"delete": True}),
]
