"""The whole cluster: up, down, and what state it is in."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.cluster import (
    certificates,
    cgroups,
    control_plane,
    machine,
    network,
    node,
    object_storage,
    processes,
    prometheus,
    stores,
    tools,
)
from deploy.local.cluster.api import Api
from deploy.local.cluster.layout import (
    API_SERVICE,
    DNS_SERVICE,
    HOST,
    MAX_NODES,
    PROMETHEUS,
    S3_PORT,
    ClusterError,
    Layout,
    tools_cache,
)

_HOST_PROCESSES = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "coredns",
    "prometheus",
)


@dataclass
class _Steps:
    """Prints what is done and when."""

    started: float

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", file=sys.stderr, flush=True)


def setup(install: bool = True) -> dict[str, Path]:
    """Everything that must be on the machine before a cluster starts. Returns program -> path.

    Raises:
        ClusterError: root, packages or tools are missing and cannot be had.
    """
    machine.require_root()
    machine.require_packages(install)
    if not machine.CNI_PLUGINS.is_dir():
        raise ClusterError(f"The local cluster needs the CNI plugins in {machine.CNI_PLUGINS}.")
    programs: dict[str, Path] = {}
    for name in tools.CLUSTER_TOOLS:
        programs |= tools.ensure(tools.TOOLS[name])
    return programs | {"versitygw": object_storage.program()}


def up(node_count: int = 2, reuse: bool = False) -> Layout:
    """Start the cluster and wait until pods can be scheduled. ``reuse``: one that runs will do.

    Raises:
        ClusterError: one runs already (without ``reuse``), the machine lacks something, or a part does not start;
            what was started is taken down again then.
    """
    if not 1 <= node_count <= MAX_NODES:
        raise ClusterError(f"nodes: {node_count} is not possible; the local cluster has 1 to {MAX_NODES}.")
    programs = setup()
    with machine.cluster_lock():
        if (running := current()) is not None:
            if reuse:
                return running
            raise ClusterError(f"A local cluster runs (state {running.state}); stop it first with `make cluster-down`.")
        layout = Layout.of(node_count)
        owner = network.owner()
        if owner not in (None, "", str(layout.state)):
            raise ClusterError(
                f"A local cluster with the state {owner} exists; stop it with "
                f"`FINETUNE_CLUSTER_STATE={owner} make cluster-down`."
            )
        if layout.state.exists() or layout.disk.exists() or owner is not None or cgroups.remains():
            print("taking down what an earlier cluster left behind", file=sys.stderr, flush=True)
            _down()
        machine.require_free_ports()
        machine.require_free_network()
        try:
            _start(layout, programs, _Steps(time.monotonic()))
        except BaseException:
            _down(keep_logs=True)
            raise
        return layout


def down() -> None:
    """Stop the cluster and remove every trace of it, also of one that crashed while starting. Nothing there: no error.

    Raises:
        ClusterError: something could not be removed.
    """
    machine.require_root()
    with machine.cluster_lock():
        _down()


def current() -> Layout | None:
    """The layout of the running cluster, or None. One whose API server or etcd died does not count."""
    layout = Layout.recorded()
    if layout is None or not (layout.state / "ready").exists():
        return None
    living = processes.recorded(layout)
    return layout if all(name in living for name in ("etcd", "kube-apiserver")) else None


def require_running() -> Layout:
    """Raises:
    ClusterError: no cluster runs.
    """
    if (layout := current()) is None:
        raise ClusterError("No local cluster runs; start one with `make cluster`.")
    return layout


def status(layout: Layout) -> dict[str, Any]:
    """What lives: processes of the host, nodes with their power and their Ready condition."""
    living = processes.recorded(layout)
    api = Api(layout)
    nodes = {}
    for each in layout.nodes:
        nodes[each.name] = {
            "address": each.address,
            "on": node.is_on(layout, each),
            "ready": _ready(api.get(f"/api/v1/nodes/{each.name}")),
        }
    return {
        "processes": {name: living.get(name) for name in (*_HOST_PROCESSES, "s3")},
        "nodes": nodes,
        "kubeconfig": str(layout.kubeconfig),
        "s3": f"http://{HOST}:{S3_PORT}",
        "prometheus": f"http://{PROMETHEUS}",
    }


def _start(layout: Layout, programs: dict[str, Path], steps: _Steps) -> None:
    for directory in (layout.state, layout.logs, layout.state / "flex", layout.disk):
        directory.mkdir(parents=True, exist_ok=True)
    layout.write_record()
    machine.remember(layout)
    network.make(layout)
    control_plane.start_etcd(layout, programs["etcd"])
    for each in layout.nodes:
        cgroups.make(each.name)  # before the capsules' configuration, which lists them
    with ThreadPoolExecutor() as pool:
        prepared = [pool.submit(node.prepare, layout, each, programs) for each in layout.nodes]
        certificates.make(layout)
        control_plane.start_api_server(layout, programs["kube-apiserver"])
        steps.say("network, certificates; etcd and API server start")
        object_storage.start(layout)
        for future in prepared:
            future.result()
    steps.say(f"image stores of {len(layout.nodes)} nodes; object storage")
    for each in layout.nodes:
        node.boot(layout, each)
    api = Api(layout)
    _wait(layout, api.ready, 90, "the API server does not get ready", "kube-apiserver")
    steps.say("API server ready")
    control_plane.start_controllers(layout, programs["kube-controller-manager"], programs["kube-scheduler"])
    _persist(layout, lambda: control_plane.apply_base_objects(api))
    control_plane.start_dns(layout, programs["coredns"])
    prometheus.start(layout, programs["prometheus"])
    stores.ensure_pause(layout)
    _wait_until_schedulable(layout, api, steps)
    (layout.state / "ready").touch()


def _wait_until_schedulable(layout: Layout, api: Api, steps: _Steps) -> None:
    for each in layout.nodes:
        _wait(
            layout,
            lambda each=each: _ready(_found(api, f"/api/v1/nodes/{each.name}")),
            90,
            f"node {each.name} does not get Ready",
            f"../{each.name}/log/kubelet",
        )
    steps.say("nodes Ready")
    _wait(layout, control_plane.dns_ready, 30, "CoreDNS does not get ready", "coredns")
    _wait(layout, prometheus.ready, 30, "Prometheus does not get ready", "prometheus")
    # Ready is not enough: kube-proxy's rules, the default ServiceAccount come a little later, and taints go
    for each in layout.nodes:
        _wait(
            layout,
            lambda each=each: all(network.serves(each, address) for address in (API_SERVICE, DNS_SERVICE)),
            30,
            f"kube-proxy of node {each.name} serves no Services",
            f"../{each.name}/log/kube-proxy",
        )
    _wait(
        layout,
        lambda: (
            (found := _found(api, "/api/v1/nodes")) and not any("taints" in item["spec"] for item in found["items"])
        ),
        30,
        "nodes stay tainted",
        "kube-controller-manager",
    )
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    problem = "there is no default ServiceAccount"
    _wait(layout, lambda: _found(api, account) is not None, 30, problem, "kube-controller-manager")
    steps.say("ready: pods can be scheduled")


def _persist(layout: Layout, act: Callable[[], None]) -> None:
    """Again if the API server, seconds old, refuses or says nothing; its last refusal is raised after a minute."""
    deadline = time.monotonic() + 60

    def done() -> bool:
        try:
            act()
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            return False
        return True

    _wait(layout, done, 90, "the API server does not take the base objects", "kube-apiserver")


def _wait(layout: Layout, condition: Callable[[], Any], seconds: float, problem: str, log: str) -> None:
    def asked() -> bool:
        living = processes.recorded(layout)
        dead = [name for name in (*_HOST_PROCESSES, *(n.name for n in layout.nodes)) if _died(layout, name, living)]
        if dead:
            text = (layout.logs / f"{dead[0]}.log").read_text(errors="replace").splitlines()[-12:]
            raise ClusterError(f"The local cluster: {dead[0]} ended at once. Its last words:\n" + "\n".join(text))
        return bool(condition())

    processes.wait_until(asked, seconds, problem, layout.logs / f"{log}.log")


def _found(api: Api, path: str) -> Any:
    """What is there; None if nothing is, or if the API server could not say so now."""
    with contextlib.suppress(ClusterError):
        return api.get(path)
    return None


def _died(layout: Layout, name: str, living: dict[str, int]) -> bool:
    return name not in living and (layout.state / "processes" / f"{name}.json").exists()


def _ready(manifest: Any) -> bool:
    conditions = ((manifest or {}).get("status") or {}).get("conditions") or []
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)


def _down(keep_logs: bool = False) -> None:
    """SIGKILL everywhere: all of it is thrown away. Each step stands alone, so that it works from any state."""
    layout = Layout.recorded() or Layout.of(0)
    processes.end([pid for each in layout.nodes if (pid := node.init_pid(layout, each)) is not None])
    processes.end(list(processes.recorded(layout).values()))
    cgroups.remove()
    network.remove()
    machine.restore(layout)
    if keep_logs and layout.logs.is_dir():
        _keep_logs(layout)
    for directory in (layout.state, layout.disk):
        machine.unmount_below(directory)
        _require_ours(directory)
        shutil.rmtree(directory, ignore_errors=True)
    left = network.remains() + cgroups.remains()
    left += [f"directory {directory}" for directory in (layout.state, layout.disk) if directory.exists()]
    if left:
        raise ClusterError(f"The cluster is down and this stays behind: {', '.join(left)}.")


def _require_ours(directory: Path) -> None:
    """Never delete below a path that somebody named by mistake."""
    parents = {Path("/"), Path.home(), tools_cache().absolute(), Path(os.getcwd())}
    if directory in parents or any(parent.is_relative_to(directory) for parent in parents):
        raise ClusterError(f"FINETUNE_CLUSTER_STATE: {directory} is not a directory of the cluster's own.")


def _keep_logs(layout: Layout) -> None:
    kept = tools_cache() / "failed-cluster-logs"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(layout.logs, kept)
    for each in layout.nodes:
        if (log := layout.node_state(each) / "log").is_dir():
            shutil.copytree(log, kept / each.name)
    print(f"the logs are kept in {kept}", file=sys.stderr, flush=True)
