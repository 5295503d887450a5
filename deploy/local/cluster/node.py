"""A node's configuration, its power switch and its cable. What runs inside is ``capsule.py``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.local.cluster import cgroups, network, processes, stores
from deploy.local.cluster.layout import (
    API_PORT,
    DNS_SERVICE,
    HOST,
    PAUSE_IMAGE,
    POD_NETWORK,
    REGISTRY_PORT,
    ClusterError,
    Layout,
    Node,
)
from deploy.local.cluster.machine import CNI_PLUGINS

COMPONENTS = ("containerd", "kube-proxy", "kubelet")
_CAPSULE = Path(__file__).parent / "capsule.py"


def prepare(layout: Layout, node: Node, programs: dict[str, Path]) -> None:
    """Configuration files, image store and disk of a node that was never booted."""
    state, disk = layout.node_state(node), layout.node_disk(node)
    for directory in (state / "log", state / "cni", state / "certs.d" / "localhost", disk / "kubelet"):
        directory.mkdir(parents=True, exist_ok=True)
    (state / "containerd.toml").write_text(_containerd(layout, node))
    registry = f"http://{HOST}:{REGISTRY_PORT}"
    (state / "certs.d" / "localhost" / "hosts.toml").write_text(
        f'server = "{registry}"\n[host."{registry}"]\n  capabilities = ["pull", "resolve"]\n'
    )
    (state / "cni" / "10-pods.conflist").write_text(json.dumps(_pod_network(node)))
    (state / "resolv.conf").write_text("# nobody answers names of other networks\n")
    (state / "kubelet.json").write_text(json.dumps(_kubelet(layout, node), indent=1))
    (state / "kube-proxy.json").write_text(json.dumps(_proxy(layout, node), indent=1))
    (state / "capsule.json").write_text(json.dumps(_capsule(layout, node, programs), indent=1))
    stores.fill(layout, node)


def boot(layout: Layout, node: Node) -> None:
    """Start the node; it is Ready within a second or two.

    Raises:
        ClusterError: it runs, or its PID 1 ended at once.
    """
    if is_on(layout, node):
        raise ClusterError(f"Node {node.name} runs.")
    cgroups.remove(node.name)  # a rebooted machine has none; old pod groups delay the kubelet by 3 s each
    cgroups.make(node.name)
    network.plug(layout, node)
    layout.containerd_socket(node).unlink(missing_ok=True)
    config = layout.node_state(node) / "capsule.json"
    processes.start(layout, node.name, [sys.executable, "-I", _CAPSULE, "enter", config])
    log = layout.logs / f"{node.name}.log"
    processes.wait_until(lambda: init_pid(layout, node) is not None, 60, f"node {node.name} does not start", log)
    subprocess.run(["ip", "route", "replace", node.pod_network, "via", node.address], check=False)


def power_off(layout: Layout, node: Node) -> None:
    """A lost machine: first its cable, then everything on it is killed. Peers get no FIN and no RST."""
    _require_on(layout, node)
    network.set_cable(node, "down")
    _kill(layout, node)


def crash(layout: Layout, node: Node) -> None:
    """Everything on the node is killed and its kernel lives: peers see closed connections at once."""
    _require_on(layout, node)
    _kill(layout, node)


def cut(node: Node) -> None:
    """A partition: the node and its pods run on and reach nobody."""
    network.set_cable(node, "down")


def heal(node: Node) -> None:
    network.set_cable(node, "up")


def kill_component(layout: Layout, node: Node, component: str) -> None:
    """SIGKILL kubelet, containerd or kube-proxy alone; pods run on.

    Raises:
        ClusterError: no such component, or the node is off.
    """
    _require_component(component)
    inside = (layout.node_state(node) / f"pid.{component}").read_text()
    processes.run("nsenter", "-t", _require_on(layout, node), "-m", "-p", "kill", "-9", inside)


def component_runs(layout: Layout, node: Node, component: str) -> bool:
    """Whether the process of that name lives inside the node.

    Raises:
        ClusterError: no such component, or the node is off.
    """
    _require_component(component)
    inside = (layout.node_state(node) / f"pid.{component}").read_text()
    program = Path("/proc") / inside / "comm"
    listed = subprocess.run(
        enter_command(layout, node, ["cat", str(program)]), capture_output=True, text=True, check=False
    )
    return listed.stdout.strip() == component


def start_component(layout: Layout, node: Node, component: str) -> None:
    """Start what `kill_component` ended."""
    _require_component(component)
    config = layout.node_state(node) / "capsule.json"
    command = enter_command(layout, node, [sys.executable, "-I", str(_CAPSULE), "component", str(config), component])
    nsenter = shutil.which(command[0]) or command[0]
    processes.start(layout, f"{node.name}-{component}", [nsenter, *command[1:]])


def enter_command(layout: Layout, node: Node, command: Sequence[str]) -> list[str]:
    """``command`` inside the node's namespaces.

    Raises:
        ClusterError: the node is off.
    """
    return ["nsenter", "-t", _require_on(layout, node), "-m", "-p", "-n", "-u", "-i", "-C", *command]


def is_on(layout: Layout, node: Node) -> bool:
    return init_pid(layout, node) is not None


def init_pid(layout: Layout, node: Node) -> int | None:
    """The host's pid of the node's PID 1, or None when it is off."""
    outer = processes.recorded(layout).get(node.name)
    if outer is None:
        return None
    inner = processes.child(outer)
    # until `unshare` has forked, the recorded process has no child; helpers of earlier steps are in its own namespace
    if inner is None or os.readlink(f"/proc/{inner}/ns/pid") == os.readlink("/proc/self/ns/pid"):
        return None
    return inner


def _kill(layout: Layout, node: Node) -> None:
    pids = [pid for pid in (init_pid(layout, node), processes.recorded(layout).get(node.name)) if pid is not None]
    processes.end(pids)
    processes.end(cgroups.members(node.name))
    network.route_services(other for other in layout.nodes if is_on(layout, other))


def _require_on(layout: Layout, node: Node) -> str:
    if (pid := init_pid(layout, node)) is None:
        raise ClusterError(f"Node {node.name} is off; boot it with `node boot {node.name}`.")
    return str(pid)


def _require_component(component: str) -> None:
    if component not in COMPONENTS:
        raise ClusterError(f"A node has no component {component!r}; it has {', '.join(COMPONENTS)}.")


def _capsule(layout: Layout, node: Node, programs: dict[str, Path]) -> dict[str, Any]:
    state = layout.node_state(node)
    kubelet = [f"--config={state}/kubelet.json", f"--kubeconfig={layout.pki}/{node.name}.kubeconfig"]
    kubelet += [f"--hostname-override={node.name}", f"--node-ip={node.address}", "--root-dir=/var/lib/kubelet", "--v=2"]
    shim = str(programs["containerd-shim-runc-v2"].parent)
    return {
        "name": node.name,
        "state": str(state),
        "disk": str(layout.node_disk(node)),
        "network_namespace": str(node.namespace_file),
        "cgroups": [str(group) for group in cgroups.groups(node.name)],
        "unified": cgroups.unified(),
        "ready": f"https://{HOST}:{API_PORT}/readyz",
        "authority": f"{layout.pki}/ca.crt",
        "path": os.pathsep.join([shim, os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]),
        "components": {
            "containerd": [str(programs["containerd"]), "-c", f"{state}/containerd.toml"],
            "kube-proxy": [str(programs["kube-proxy"]), f"--config={state}/kube-proxy.json"],
            "kubelet": [str(programs["kubelet"]), *kubelet],
        },
    }


def _containerd(layout: Layout, node: Node) -> str:
    state = layout.node_state(node)
    unused = [f"io.containerd.snapshotter.v1.{name}" for name in ("btrfs", "zfs", "aufs", "devmapper")]
    unused.append("io.containerd.internal.v1.opt")
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    runc = f"{cri}.containerd.runtimes.runc"
    # restrict_oom_score_adj: where scores may not be lowered, no sandbox starts without it
    return f"""version = 2
root = "{layout.node_disk(node)}/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = {json.dumps(unused)}
[grpc]
  address = "{layout.containerd_socket(node)}"
[{cri}]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[{cri}.cni]
  bin_dir = "{CNI_PLUGINS}"
  conf_dir = "{state}/cni"
[{cri}.registry]
  config_path = "{state}/certs.d"
[{runc}]
  runtime_type = "io.containerd.runc.v2"
[{runc}.options]
  SystemdCgroup = false
[plugins."io.containerd.gc.v1.scheduler"]
  startup_delay = "100ms"
"""


def _pod_network(node: Node) -> dict[str, Any]:
    addresses = {"type": "host-local", "ranges": [[{"subnet": node.pod_network}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge | {"ipam": addresses}, ports]}


def _kubelet(layout: Layout, node: Node) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket(node)}",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{layout.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{layout.pki}/{node.name}-serving.crt",
        "tlsPrivateKeyFile": f"{layout.pki}/{node.name}-serving.key",
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": f"{layout.node_state(node)}/resolv.conf",
        "volumePluginDir": "/var/lib/kubelet/volplugins",
        "podLogsDir": "/var/log/pods",
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": 8,  # renewed at a quarter of it: well under the grace period
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        # no image garbage collection: nobody could pull the images again
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "serializeImagePulls": False,
        "syncFrequency": "10s",
        "shutdownGracePeriod": "0s",
    }


def _proxy(layout: Layout, node: Node) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": POD_NETWORK,
        "hostnameOverride": node.name,
        "clientConnection": {"kubeconfig": f"{layout.pki}/proxy.kubeconfig"},
        # these settings belong to the host's kernel
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "iptables": {"minSyncPeriod": "100ms", "syncPeriod": "30s"},
    }
