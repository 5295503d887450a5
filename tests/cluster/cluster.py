"""The local cluster as tests see it: kubectl, faults, object storage, Prometheus, the audit log."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from deploy.local.cluster import (
    cgroups,
    cluster,
    images,
    machine,
    network,
    node,
    object_storage,
    processes,
    stores,
    tools,
)
from deploy.local.cluster.layout import PROMETHEUS, ClusterError, Layout, tools_cache
from deploy.local.s3.server import S3Server
from tests.tiers import cannot_run, required

PROBE_IMAGE = "localhost/probe:1"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


class LocalCluster:
    """A running cluster. Names of nodes are n1, n2, ..."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.kubeconfig: Path = layout.kubeconfig
        self.environment = os.environ | {"KUBECONFIG": str(layout.kubeconfig)}

    # ---- objects

    def kubectl(self, *words: str, text: str | None = None, check: bool = True, seconds: float = 60) -> str:
        """The output of kubectl as the administrator; with ``check=False`` also its errors, and no exception."""
        command = [str(tools.program("kubectl")), *words]
        done = subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True, timeout=seconds, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(words)}: {done.stdout.strip()} {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def apply(self, *manifests: dict[str, Any], namespace: str | None = None) -> None:
        """Server-side apply."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        place = ["--namespace", namespace] if namespace else []
        self.kubectl("apply", "--server-side", *place, "--filename", "-", text=json.dumps(items))

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any] | None:
        """One object, or None."""
        found = self.kubectl("get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "json")
        return json.loads(found) if found else None

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> list[dict[str, Any]]:
        """Objects of a namespace, by label selector."""
        words = ["get", kind, "--namespace", namespace, "--output", "json", "--selector", selector]
        return list(json.loads(self.kubectl(*words))["items"])

    @contextlib.contextmanager
    def namespace(self, prefix: str = "t") -> Iterator[str]:
        """A new namespace that accepts restricted pods only; deleted at the end, not waited for."""
        name = f"{prefix}-{secrets.token_hex(4)}"
        metadata = {"name": name, "labels": RESTRICTED}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
        try:
            account = "serviceaccount"
            wait_for(lambda: self.get(account, "default", name) is not None, 30, f"{name} has no default account")
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false", check=False)

    # ---- nodes and faults

    def node_ready(self, name: str) -> bool:
        """As the API server sees it now."""
        manifest = self.get("node", name)
        assert manifest is not None
        conditions = manifest["status"]["conditions"]
        return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)

    def wait_until_node(self, name: str, ready: bool, seconds: float = 60) -> float:
        """Returns how many seconds it took."""
        started = time.monotonic()
        wait_for(lambda: self.node_ready(name) is ready, seconds, f"node {name} does not become ready={ready}")
        return time.monotonic() - started

    def power_off(self, name: str) -> None:
        """A lost machine: nobody is told."""
        self._change(lambda: node.power_off(self.layout, self.layout.node(name)))

    def crash(self, name: str) -> None:
        """All processes of a node die; peers see closed connections."""
        self._change(lambda: node.crash(self.layout, self.layout.node(name)))

    def boot(self, name: str) -> None:
        """Switch a node on again, with a cable that carries."""
        self._change(lambda: node.boot(self.layout, self.layout.node(name)))

    def cut(self, name: str) -> None:
        """Partition: node and pods live and reach nobody."""
        node.cut(self.layout.node(name))

    def heal(self, name: str) -> None:
        node.heal(self.layout.node(name))

    def kill_component(self, name: str, component: str) -> None:
        """SIGKILL kubelet, containerd or kube-proxy of a node."""
        self._change(lambda: node.kill_component(self.layout, self.layout.node(name), component))

    def start_component(self, name: str, component: str) -> None:
        self._change(lambda: node.start_component(self.layout, self.layout.node(name), component))

    def run_on(self, name: str, *command: str) -> str:
        """The output of a command inside a node's namespaces."""
        words = node.enter_command(self.layout, self.layout.node(name), command)
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout

    def load_image(self, archive: Path) -> None:
        """Import an image archive into every node."""
        stores.load(self.layout, archive)

    def repair(self) -> None:
        """Undo every fault, and wait until all nodes are Ready."""
        silent: dict[str, str] = {}  # when its kubelet last spoke: Ready is a belief until it has spoken again
        for each in self.layout.nodes:
            spoke = self._last_word(each.name)
            if not node.is_on(self.layout, each):
                self.boot(each.name)
                silent[each.name] = spoke
                continue
            if not network.carries(each):
                node.heal(each)
                silent[each.name] = spoke
            for component in node.COMPONENTS:
                if not node.component_runs(self.layout, each, component):
                    self.start_component(each.name, component)
                    silent[each.name] = spoke
        if not self.s3_runs():
            self.start_s3()
        for name, spoke in silent.items():
            wait_for(lambda n=name, s=spoke: self._last_word(n) != s, 60, f"node {name} does not speak again")
        for each in self.layout.nodes:
            self.wait_until_node(each.name, ready=True)

    def _last_word(self, name: str) -> str:
        """When the node's kubelet renewed its lease."""
        lease = self.get("lease", name, "kube-node-lease")
        return str(lease["spec"]["renewTime"]) if lease else ""

    # ---- services of the host

    def s3(self) -> S3Server:
        """Buckets, files of objects, ``environment`` with the endpoint for host and pods; do not start or stop it."""
        return object_storage.server(self.layout)

    def s3_runs(self) -> bool:
        return "s3" in processes.recorded(self.layout)

    def stop_s3(self) -> None:
        """Connections are refused from now on."""
        self._change(lambda: object_storage.stop(self.layout))

    def start_s3(self) -> None:
        """With the same objects, port and credentials."""
        self._change(lambda: object_storage.start(self.layout))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers to an instant query: [{"metric": {...}, "value": [time, text]}]."""
        url = f"http://{PROMETHEUS}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(json.load(answer)["data"]["result"])

    def audit(self, user: str) -> list[dict[str, Any]]:
        """Audit events of one user, for example ``system:serviceaccount:NAMESPACE:NAME``; all verbs."""
        lines = self.layout.audit_log.read_text(encoding="utf-8").splitlines(keepends=True)
        told = [json.loads(line) for line in lines if f'"{user}"' in line and line.endswith("\n")]
        return [event for event in told if event["user"].get("username") == user]

    def _change(self, act: Callable[[], Any]) -> None:
        with machine.cluster_lock():
            act()


def machine_state() -> dict[str, str]:
    """What a cluster could leave on this machine: links, routes, firewall, mounts, cgroups, settings, processes."""
    state = {}
    for command in ("ip -brief link", "ip route", "ip netns", "iptables-save"):
        output = subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout
        # counters, comments, and the flags of links that others own change by themselves
        kept = [line.split(" [")[0] for line in output.splitlines() if not line.startswith("#")]
        state[command] = "\n".join(sorted({line.split()[0] for line in kept} if "link" in command else kept))
    ours = ("finetune-cluster", "running-cluster", "/run/netns", "/var/lib/kubelet", "/var/lib/cni")
    mounts = Path("/proc/mounts").read_text().splitlines()
    state["mounts"] = "\n".join(line for line in mounts if any(word in line for word in ours))
    state["cgroups"] = "\n".join(cgroups.remains())
    for name in ("kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory", "net/ipv4/ip_forward"):
        state[name] = Path("/proc/sys", name).read_text().strip()
    layout = Layout.of(0)
    places = [layout.state, layout.disk, *map(Path, ("/run/netns", "/var/lib/kubelet", "/var/lib/cni"))]
    state["directories"] = "\n".join(str(path) for path in places if path.exists())
    state["processes"] = "\n".join(_processes_of(layout))
    return state


def _processes_of(layout: Layout) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if path.parent.name != str(os.getpid()) and (f"{layout.state}/" in line or f"{layout.disk}/" in line):
                found.append(line)
    return sorted(found)


def wait_for(condition: Callable[[], Any], seconds: float, problem: str, pause: float = 0.1) -> Any:
    """The first true answer; an AssertionError with ``problem`` when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{problem} (waited {seconds:.0f} s)"
        time.sleep(pause)
    return answer


@contextlib.contextmanager
def shared_cluster() -> Iterator[LocalCluster]:
    """One cluster for all test workers: the first starts it, the last takes it down, unless a person started it.

    Skips where the machine cannot run one; fails there if CI or FINETUNE_REQUIRE_CLUSTER is set.
    """
    require_machine()
    with _lock_file("sessions") as sessions:
        with only_one("start"):
            with contextlib.suppress(BlockingIOError):  # a worker that lives uses the cluster
                fcntl.flock(sessions, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_remains()
            fcntl.flock(sessions, fcntl.LOCK_SH)
            layout = running_layout() or _started()
        try:
            yield LocalCluster(layout)
        finally:
            fcntl.flock(sessions, fcntl.LOCK_UN)
            with contextlib.suppress(BlockingIOError):  # another worker still uses it
                fcntl.flock(sessions, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _mark(layout).exists():
                    before = json.loads(_mark(layout).read_text(encoding="utf-8"))
                    cluster.down()
                    assert machine_state() == before


def _started() -> Layout:
    before = machine_state()
    images.build()  # before the nodes: they share the golden store instead of getting gigabytes each
    _starting().touch()  # below the layout's state it would not survive the start
    try:
        layout = cluster.up(2)
        mark_as_ours(layout, before)
    finally:
        _starting().unlink()
    return layout


def mark_as_ours(layout: Layout, before: dict[str, str]) -> None:
    """Tests started this cluster: it may be taken down without asking. ``before``: the machine without it."""
    _mark(layout).write_text(json.dumps(before), encoding="utf-8")


def running_layout() -> Layout | None:
    """The cluster that runs, whoever started it; one that is just starting is waited for."""
    with machine.cluster_lock():
        return cluster.current()


def remove_remains() -> None:
    """Take down what a test run that was killed has left; only for who holds the sessions' lock exclusively.

    A cluster that a person started stays, also one whose etcd died: then nothing can run beside it.
    """
    layout = running_layout()
    known = Layout.of(0) if layout is None else layout
    if _mark(known).exists() or (layout is None and _starting().exists()):
        cluster.down()
    elif layout is None and known.state.exists():
        cannot_run("cluster", f"a cluster in {known.state} is not whole; take it down with `make cluster-down`")
    _starting().unlink(missing_ok=True)


@contextlib.contextmanager
def session_lock(kind: int) -> Iterator[None]:
    """Shared by workers that use the cluster of the run; exclusive for tests that need a machine without one."""
    with _lock_file("sessions") as lock:
        fcntl.flock(lock, kind)
        yield


@contextlib.contextmanager
def undisturbed(exclusive: bool) -> Iterator[None]:
    """Tests that break nodes run alone; the others run beside each other."""
    with _lock_file("faults") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def only_one(what: str) -> Iterator[None]:
    """Workers do ``what`` one after the other."""
    with _lock_file(what) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock_file(name: str) -> IO[str]:
    """Closing it, also by the death of its process, gives the lock back."""
    tools_cache().mkdir(parents=True, exist_ok=True)
    return (tools_cache() / f"cluster-test-{name}.lock").open("w")


def _mark(layout: Layout) -> Path:
    return layout.state / "started-by-tests"


def _starting() -> Path:
    """Exists while tests start a cluster, and after a start that was killed."""
    return tools_cache() / "cluster-test-starting"


def require_machine() -> None:
    """Skips, or fails where the tier is required, if this machine cannot run a cluster."""
    try:
        cluster.setup(install=required())
    except ClusterError as error:
        cannot_run("cluster", error)
