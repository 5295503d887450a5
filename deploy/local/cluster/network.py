"""The nodes' network: one bridge, one network namespace and one cable per node, routes between pods.

The host keeps ip_forward = 0 and gets no firewall rule, so nothing can leave the machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from deploy.local.cluster.layout import BRIDGE, HOST, PREFIX, SERVICE_NETWORK, ClusterError, Layout, Node
from deploy.local.cluster.processes import run


def make(layout: Layout) -> None:
    """Bridge, nodes, and routes from the host to pods and Services."""
    _batch(
        f"link add {BRIDGE} type bridge",
        f"link set {BRIDGE} alias {layout.state}",  # who owns it, for a cluster with another state directory
        f"addr add {HOST}/24 dev {BRIDGE}",
        f"link set {BRIDGE} up",
    )
    for node in layout.nodes:
        plug(layout, node)
    _batch(*(f"route add {node.pod_network} via {node.address}" for node in layout.nodes))
    route_services(layout.nodes)


def plug(layout: Layout, node: Node) -> None:
    """A fresh network namespace for ``node`` (a booted machine has no old interfaces or rules), on the bridge."""
    unplug(node)
    run("ip", "netns", "add", node.link)
    _batch(
        f"link add {node.link} type veth peer name eth0 netns {node.link}",
        f"link set {node.link} master {BRIDGE} up",
    )
    others = [other for other in layout.nodes if other != node]
    _batch(
        f"addr add {node.address}/24 dev eth0",
        "link set eth0 up",
        "link set lo up",
        f"route add default via {HOST}",
        *(f"route add {other.pod_network} via {other.address}" for other in others),
        namespace=node.link,
    )


def unplug(node: Node) -> None:
    """Remove the node's namespace and cable, if there."""
    if node.namespace_file.exists():
        run("ip", "netns", "del", node.link)
    if (Path("/sys/class/net") / node.link).exists():  # the kernel removes it some time after the namespace
        subprocess.run(["ip", "link", "del", node.link], capture_output=True, check=False)


def set_cable(node: Node, state: str) -> None:
    """``down``: packets to and from the node vanish, nobody is told. ``up`` again."""
    run("ip", "link", "set", node.link, state)


def carries(node: Node) -> bool:
    """Whether the node's cable is up."""
    return bool(int((Path("/sys/class/net") / node.link / "flags").read_text(), 16) & 1)  # IFF_UP


def route_services(living: Iterable[Node]) -> None:
    """The host reaches Services through the kube-proxy of a node that lives."""
    for node in living:
        run("ip", "route", "replace", SERVICE_NETWORK, "via", node.address)
        return


def serves(node: Node, address: str) -> bool:
    """Whether the node's kube-proxy leads connections to the Service at ``address`` to an endpoint.

    A connection that is begun earlier hangs until its client gives up: the kernel asks the rules once per connection.
    """
    listed = subprocess.run(
        ["ip", "netns", "exec", node.link, "iptables", "-t", "nat", "-S", "KUBE-SERVICES"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    return any(f"-d {address}/32 " in rule and "-j KUBE-SVC-" in rule for rule in listed.splitlines())


def owner() -> str | None:
    """The state directory of the cluster that owns the bridge, or None if there is no bridge."""
    device = Path("/sys/class/net") / BRIDGE
    return (device / "ifalias").read_text().strip() if device.exists() else None


def remove() -> None:
    """Everything by name, so that it also works after a crash and without a record."""
    for path in Path("/run/netns").glob(f"{PREFIX}n*"):
        run("ip", "netns", "del", path.name)
    for path in Path("/sys/class/net").glob(f"{PREFIX}n*"):
        subprocess.run(["ip", "link", "del", path.name], capture_output=True, check=False)
    if owner() is not None:
        run("ip", "link", "del", BRIDGE)


def remains() -> list[str]:
    """Names of what `remove` should have removed."""
    namespaces = [f"network namespace {path.name}" for path in Path("/run/netns").glob(f"{PREFIX}n*")]
    links = [f"link {path.name}" for path in Path("/sys/class/net").glob(f"{PREFIX}n*")]
    return namespaces + links + ([f"link {BRIDGE}"] if owner() is not None else [])


def _batch(*lines: str, namespace: str | None = None) -> None:
    place = ["-n", namespace] if namespace else []
    try:
        run("ip", *place, "-batch", "-", text="\n".join(lines) + "\n")
    except ClusterError as error:
        raise ClusterError(f"The nodes' network cannot be made: {error}") from error
