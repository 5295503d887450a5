"""One node: runs on the host's own Python as a script, first outside, then as PID 1 of the node's namespaces.

    capsule.py enter CONFIG       join the node's cgroups and network, make the other namespaces, go on as `init`
    capsule.py init CONFIG        PID 1: private mounts, then containerd, kube-proxy and kubelet; reaps orphans
    capsule.py component CONFIG NAME   one of these three (also to start it again)

SIGKILL of PID 1 is a power loss: the kernel kills everything in its pid namespace at once. CONFIG is a JSON file that
``node.py`` writes: name, state, disk, network_namespace, cgroups, unified, ready, authority, components.
"""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

CGROUP_ROOT = Path("/sys/fs/cgroup")


def enter(path: str, config: dict[str, Any]) -> None:
    for group in config["cgroups"]:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    # nsenter and not `ip netns exec`, which would mount a new /sys without cgroups
    command = ["nsenter", f"--net={config['network_namespace']}", "unshare", "--cgroup", "--mount"]
    command += ["--propagation", "slave", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
    os.execvp("nsenter", [*command, sys.executable, "-I", __file__, "init", path])


def init(path: str, config: dict[str, Any]) -> None:
    socket.sethostname(config["name"])
    mount("--make-rshared", "/")  # the kubelet needs it inside; we are a slave of the host, so nothing leaks out
    mount("-t", "proc", "proc", "/proc")
    private_unified_cgroup() if config["unified"] else private_cgroups()
    private_directories(config)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")  # of this network namespace
    log = Path(config["state"]) / "log" / "containerd.log"
    earlier = log.stat().st_size if log.exists() else 0  # what it said before the node was switched off
    launch(path, "containerd")
    launch(path, "kube-proxy")
    wait_for_containerd(log, earlier)
    launch(path, "kubelet")
    while True:
        with contextlib.suppress(ChildProcessError):
            os.wait()
            continue
        time.sleep(1)


def private_cgroups() -> None:
    """Every v1 hierarchy mounted anew: it shows the node's group as its root."""
    for path in sorted(CGROUP_ROOT.iterdir()):
        if path.is_symlink() or not (path / "cgroup.procs").exists():
            continue
        kind, options = "cgroup", path.name
        if path.name == "systemd":
            options = "none,name=systemd"
        elif path.name == "unified":
            kind, options = "cgroup2", "rw"
        subprocess.run(["umount", str(path)], check=True)  # mounting over it fails with EBUSY
        mount("-t", kind, "-o", options, kind, str(path))


def private_unified_cgroup() -> None:
    """cgroup v2: only leaves may hold processes once controllers are handed down. Not run on a real machine yet."""
    subprocess.run(["umount", str(CGROUP_ROOT)], check=True)
    mount("-t", "cgroup2", "cgroup2", str(CGROUP_ROOT))
    leaf = CGROUP_ROOT / "system"
    leaf.mkdir(exist_ok=True)
    for pid in (CGROUP_ROOT / "cgroup.procs").read_text().split():
        (leaf / "cgroup.procs").write_text(pid)
    controllers = (CGROUP_ROOT / "cgroup.controllers").read_text().split()
    (CGROUP_ROOT / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))


def private_directories(config: dict[str, Any]) -> None:
    state, disk = Path(config["state"]), Path(config["disk"])
    # /run of its own (locks, containerd's state, namespaces of pods), except for the cluster's files if they are there
    private = state / "run"
    private.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(private))
    cluster = state.parent
    if cluster.is_relative_to("/run"):
        inside = private / cluster.relative_to("/run")
        inside.mkdir(parents=True)
        mount("--bind", str(cluster), str(inside))
    mount("--rbind", str(private), "/run")
    for name in ("netns", "lock", "containerd"):
        Path("/run", name).mkdir()
    # cAdvisor looks at the standard place; without it there are no metrics per container
    Path("/run/containerd/containerd.sock").symlink_to(state / "containerd.sock")
    mount("-t", "tmpfs", "tmpfs", "/var/log")  # the kubelet's /var/log/containers is fixed
    for name in ("pods", "containers"):
        Path("/var/log", name).mkdir()
    mount("--bind", str(disk / "kubelet"), "/var/lib/kubelet")
    mount("-t", "tmpfs", "tmpfs", "/var/lib/cni")  # addresses of pods start afresh at every boot


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def launch(path: str, name: str) -> None:
    subprocess.Popen([sys.executable, "-I", __file__, "component", path, name], start_new_session=True)


def component(config: dict[str, Any], name: str) -> None:
    state = Path(config["state"])
    (state / f"pid.{name}").write_text(str(os.getpid()))  # as the node counts
    log = os.open(state / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if name == "kube-proxy":
        wait_for_api_server(config["ready"], config["authority"])
    command = config["components"][name]
    os.execv(command[0], command)


def wait_for_containerd(log: Path, earlier: int) -> None:
    """It listens before it serves pods; a kubelet that asks in between gives up, and nobody starts it again."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and b"containerd successfully booted" in log.read_bytes()[earlier:]:
            return
        time.sleep(0.03)
    sys.exit(f"containerd does not get ready; its log is {log}")


def wait_for_api_server(url: str, authority: str) -> None:
    """A kube-proxy that asks too early is refused, asks again after seconds, and meanwhile no Service is served."""
    context = ssl.create_default_context(cafile=authority)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    deadline = time.monotonic() + 60  # it may be away: then kube-proxy starts all the same
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), direct.open(url, timeout=5):
            return
        time.sleep(0.1)


def main() -> None:
    action, path = sys.argv[1:3]
    config = json.loads(Path(path).read_text())
    os.environ["PATH"] = config["path"]
    if action == "component":
        component(config, sys.argv[3])
    elif action == "init":
        init(path, config)
    else:
        enter(path, config)


if __name__ == "__main__":
    main()
