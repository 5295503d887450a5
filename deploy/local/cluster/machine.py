"""What the cluster needs from this machine, and what it must give back as it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.cluster.layout import (
    COREDNS_READY,
    ETCD,
    ETCD_PEER,
    HOST,
    PROMETHEUS,
    ClusterError,
    Layout,
    tools_cache,
)

CNI_PLUGINS = Path("/usr/lib/cni")
PACKAGES = {
    "runc": "runc",
    "containernetworking-plugins": str(CNI_PLUGINS / "bridge"),
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "iproute2": "ip",
    "util-linux": "nsenter",
    "openssl": "openssl",
    "procps": "sysctl",
}
"""Debian package -> a program of it."""

_SYSCTLS = ("kernel.panic", "kernel.panic_on_oops", "vm.overcommit_memory")  # the kubelet sets them for everybody
NAMESPACES = Path("/run/netns")
_HOST_DIRECTORIES = (Path("/var/lib/kubelet"), Path("/var/lib/cni"), NAMESPACES)  # mount points of the nodes


def require_root() -> None:
    """Raises:
    ClusterError: namespaces, cgroups and a bridge need root.
    """
    if os.geteuid() != 0:
        raise ClusterError("The local cluster needs root (namespaces, cgroups, a bridge); run it as root.")


def missing_packages() -> list[str]:
    """Debian packages that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [package for package, name in PACKAGES.items() if not shutil.which(name, path=path)]


def require_packages(install: bool) -> None:
    """Install what is missing with apt-get, or say the one command that does.

    Raises:
        ClusterError: something is missing and was not or could not be installed.
    """
    missing = missing_packages()
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if not install or not shutil.which("apt-get"):
        raise ClusterError(f"The local cluster needs more system packages: {' '.join(command)}")
    print(f"installing {' '.join(missing)}", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update"], command):
        done = subprocess.run(step, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(f"`{' '.join(step)}` failed: {done.stderr.strip()[-1500:]}")
    if missing := missing_packages():
        raise ClusterError(f"apt-get installed the packages and still these are missing: {', '.join(missing)}.")


def require_free_ports() -> None:
    """Raises:
    ClusterError: another program listens where the cluster must.
    """
    for address in (ETCD, ETCD_PEER, COREDNS_READY, PROMETHEUS):
        host, _, port = address.partition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise ClusterError(f"The local cluster needs {address} and another program holds it.") from error


def require_free_network() -> None:
    """Raises:
    ClusterError: this machine already routes the nodes' network elsewhere, or its firewall would cut bridged traffic.
    """
    routes = subprocess.run(["ip", "-4", "route", "show"], capture_output=True, text=True, check=True).stdout
    network = HOST.rsplit(".", 1)[0] + "."
    if any(line.startswith(network) for line in routes.splitlines()):
        raise ClusterError(f"The local cluster needs {network}0/24 and this machine already has a route to it.")
    bridged = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if bridged.is_file() and bridged.read_text().strip() == "1":
        rules = subprocess.run(["iptables", "-S", "FORWARD"], capture_output=True, text=True, check=False).stdout
        if "-P FORWARD DROP" in rules:
            raise ClusterError(
                "The host's firewall drops forwarded packets and also sees bridged ones, so nodes could not talk; "
                "run `sysctl net.bridge.bridge-nf-call-iptables=0` first."
            )


@contextmanager
def cluster_lock() -> Iterator[None]:
    """Held while a cluster starts, stops or a node changes; waits for another process that holds it."""
    tools_cache().mkdir(parents=True, exist_ok=True)
    with (tools_cache() / "cluster.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that starts or stops the cluster", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remember(layout: Layout) -> None:
    """Write down what `restore` must put back, and make the nodes' mount points."""
    sysctls = {name: _sysctl(name).read_text().strip() for name in _SYSCTLS}
    made = [str(path) for path in _HOST_DIRECTORIES if not path.exists()]
    mounted = [str(path) for path in _HOST_DIRECTORIES if str(path) in _mount_points()]
    record = {"sysctls": sysctls, "made": made, "mounted": mounted}
    (layout.state / "machine.json").write_text(json.dumps(record))
    for path in _HOST_DIRECTORIES:
        path.mkdir(parents=True, exist_ok=True)


def restore(layout: Layout) -> None:
    """Put the machine's settings back; nothing remembered is no error."""
    path = layout.state / "machine.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    for name, value in before["sysctls"].items():
        if _sysctl(name).read_text().strip() != value:
            _sysctl(name).write_text(value)
    if (
        str(NAMESPACES) not in before["mounted"]
        and str(NAMESPACES) in _mount_points()
        and not any(NAMESPACES.iterdir())
    ):
        subprocess.run(["umount", str(NAMESPACES)], check=False)  # `ip netns` makes it a mount and leaves it
    for directory in map(Path, before["made"]):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def unmount_below(directory: Path) -> None:
    """Detach every mount under ``directory``, deepest first."""
    for mount in sorted((m for m in _mount_points() if m.startswith(f"{directory}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def _mount_points() -> list[str]:
    """Also binds of the same file system, which `Path.is_mount` does not see."""
    return [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name.replace(".", "/")
