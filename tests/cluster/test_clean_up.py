"""A cluster that comes and goes, also one whose start was killed, leaves the machine as it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.local.cluster import cluster, processes, tools
from deploy.local.cluster.layout import Layout, tools_cache
from deploy.local.s3.server import binary
from tests.cluster.cluster import (
    LocalCluster,
    machine_state,
    mark_as_ours,
    remove_remains,
    require_machine,
    running_layout,
    session_lock,
    wait_for,
)
from tests.tiers import cannot_run

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "deploy.local.cluster"]
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
SESSION = """
import sys
from tests.cluster.cluster import shared_cluster
with shared_cluster():
    print("running", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def idle_machine() -> Iterator[None]:
    """No cluster, and nobody starts one during the test."""
    with session_lock(fcntl.LOCK_EX):
        require_no_cluster()
        cluster.down()
        yield
        cluster.down()


def require_no_cluster() -> None:
    """Only what a killed test run has left is taken down."""
    require_machine()
    remove_remains()
    if (running := running_layout()) is not None:
        cannot_run("clean-up", f"a local cluster runs (state {running.state}) and is not taken down for them")


def test_three_nodes_come_and_leave_nothing(idle_machine: None) -> None:
    before = machine_state()
    assert before["directories"] == before["processes"] == before["cgroups"] == ""
    started = time.monotonic()
    layout = cluster.up(3)
    mark_as_ours(layout, before)
    assert time.monotonic() - started < 60
    running = LocalCluster(layout)
    assert [running.node_ready(name) for name in ("n1", "n2", "n3")] == [True, True, True]
    cluster.down()
    assert machine_state() == before
    cluster.down()  # nothing there is no error


@pytest.mark.parametrize("reached", ["processes/etcd.json", "processes/n2.json", "processes/kube-scheduler.json"])
def test_a_start_that_was_killed_leaves_nothing_after_down(idle_machine: None, reached: str) -> None:
    before = machine_state()
    command, nowhere = [*DIES_WITH_US, *COMMAND, "up"], subprocess.DEVNULL
    starting = subprocess.Popen(command, cwd=ROOT, stdout=nowhere, stderr=nowhere)
    wait_for((Layout.of(0).state / reached).exists, 60, f"the start does not reach {reached}", pause=0.01)
    starting.send_signal(signal.SIGKILL)
    starting.wait()
    assert machine_state() != before
    done = subprocess.run([*COMMAND, "down"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine_state() == before


def test_a_start_that_fails_says_why_and_takes_everything_down(idle_machine: None, tmp_path: Path) -> None:
    before = machine_state()
    # an etcd of the right version that does not run
    broken = tmp_path / "etcd"
    version = '[ "$1" = --version ] && echo etcd Version: 3.6.16 && exit 0'
    broken.write_text(f"#!/bin/sh\n{version}\necho no etcd today; exit 1\n")
    broken.chmod(0o755)
    environment = os.environ | {"KUBEBUILDER_ASSETS": str(tmp_path), "FINETUNE_TOOLS_CACHE": str(tmp_path / "cache")}
    link_all_tools_but("etcd", tmp_path / "cache")
    done = subprocess.run([*COMMAND, "up"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("The local cluster: etcd ended at once. Its last words:\nno etcd today\n")
    assert machine_state() == before
    assert not (tmp_path / "cache" / "running-cluster").exists()


def link_all_tools_but(left_out: str, cache: Path) -> None:
    """A tools cache that lacks one tool, whose builds and images concern nobody else."""
    cache.mkdir()
    used = [tools.TOOLS[name].directory for name in tools.CLUSTER_TOOLS if name != left_out]
    for place in (*used, binary().parent):
        if place.is_dir() and place.parent == tools_cache():  # else it is installed on this machine
            (cache / place.name).symlink_to(place)


def test_the_cluster_of_a_test_run_that_was_killed_is_no_cluster_for_the_next_one() -> None:
    with session_lock(fcntl.LOCK_EX):
        require_no_cluster()
        before = machine_state()
    with another_run():
        first = api_server()
    assert api_server() == first, "nobody has taken it down"
    with another_run() as after:
        assert api_server() != first, "a new one"
        after.communicate(timeout=120)
    assert after.returncode == 0
    assert machine_state() == before


@contextlib.contextmanager
def another_run() -> Iterator[subprocess.Popen[str]]:
    """A process that uses the cluster as fixtures do until its standard input ends; at the end of all it is killed."""
    command = [*DIES_WITH_US, sys.executable, "-c", SESSION]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "running\n"
            yield process
        finally:
            process.kill()


def api_server() -> int:
    return processes.recorded(Layout.of(0))["kube-apiserver"]
