"""Names, addresses and places of the local cluster. Everything that it makes on this machine is named here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "ftc0"  # the network of the nodes
PREFIX = "ftc-"  # network namespaces and links of the nodes
CGROUP = "finetune-cluster"
HOST = "10.231.0.1"
POD_NETWORK = "10.232.0.0/16"
SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
API_PORT = 6443
S3_PORT = 7070
REGISTRY_PORT = 5000
PROMETHEUS = "127.0.0.1:19090"
ETCD = "127.0.0.1:23790"
ETCD_PEER = "127.0.0.1:23800"
COREDNS_READY = "127.0.0.1:8181"
PAUSE_IMAGE = "localhost/pause:1"
MAX_NODES = 9


class ClusterError(RuntimeError):
    """What a person must know or do, in one sentence."""


def tools_cache() -> Path:
    """Built tools and image stores, outside the repository; kept between clusters."""
    return Path(os.environ.get("FINETUNE_TOOLS_CACHE") or Path.home() / ".cache" / "finetune-tools")


@dataclass(frozen=True)
class Node:
    """A node by its number (1, 2, ...)."""

    number: int

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def address(self) -> str:
        return f"10.231.0.{10 + self.number}"

    @property
    def pod_network(self) -> str:
        return f"10.232.{self.number}.0/24"

    @property
    def link(self) -> str:
        """The node's network namespace and the host's end of its cable."""
        return PREFIX + self.name

    @property
    def namespace_file(self) -> Path:
        return Path("/run/netns") / self.link


@dataclass(frozen=True)
class Layout:
    """Where one cluster keeps its files.

    ``state`` holds sockets, certificates, configuration and logs; ``disk`` the nodes' image stores and volumes, the
    objects of the S3 server and etcd. The disk lies beside the image cache because blobs are
    hard links to it.
    """

    state: Path
    disk: Path
    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, node_count: int) -> Layout:
        state = Path(os.environ.get("FINETUNE_CLUSTER_STATE") or "/run/finetune-cluster").absolute()
        nodes = tuple(Node(number) for number in range(1, node_count + 1))
        return cls(state, tools_cache().absolute() / "running-cluster", nodes)

    @classmethod
    def recorded(cls) -> Layout | None:
        """The layout of the cluster that `up` began to make, or None."""
        layout = cls.of(0)
        if not layout.record.is_file():
            return None
        try:
            record = json.loads(layout.record.read_text(encoding="utf-8"))
        except ValueError:  # cut off in the middle: nothing but the record exists yet
            return layout
        return cls(layout.state, Path(record["disk"]), tuple(Node(number) for number in record["nodes"]))

    def write_record(self) -> None:
        self.record.write_text(json.dumps({"disk": str(self.disk), "nodes": [node.number for node in self.nodes]}))

    @property
    def record(self) -> Path:
        return self.state / "cluster.json"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.state / "kubeconfig"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "log"

    @property
    def audit_log(self) -> Path:
        """JSON lines: every request of a service account outside kube-system, and all writes."""
        return self.state / "audit.log"

    @property
    def s3_environment(self) -> Path:
        """KEY=VALUE lines that an S3 client needs; readable by root only."""
        return self.state / "s3.env"

    @property
    def s3_directory(self) -> Path:
        return self.disk / "s3"

    @property
    def prometheus_rules(self) -> Path:
        """Rule files put here are read after POST /-/reload."""
        return self.state / "prometheus" / "rules"

    def node_state(self, node: Node) -> Path:
        return self.state / node.name

    def node_disk(self, node: Node) -> Path:
        return self.disk / node.name

    def containerd_socket(self, node: Node) -> Path:
        return self.node_state(node) / "containerd.sock"

    def node(self, name: str) -> Node:
        """Raises:
        ClusterError: the cluster has no such node.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes)
        raise ClusterError(f"The cluster has no node {name!r}; it has {names}.")
