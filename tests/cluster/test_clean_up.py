"""A cluster that comes and goes, also one whose start was killed, leaves the machine as it was."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.local.cluster import cluster
from deploy.local.cluster.layout import Layout
from tests.cluster.cluster import LocalCluster, machine_state, require_machine, session_lock, wait_for
from tests.tiers import cannot_run

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "deploy.local.cluster"]


@pytest.fixture
def idle_machine() -> Iterator[None]:
    """No cluster, and nobody starts one during the test."""
    require_machine()
    with session_lock(fcntl.LOCK_EX):
        if (running := cluster.current()) is not None:
            cannot_run("clean-up", f"a local cluster runs (state {running.state}) and is not taken down for them")
        cluster.down()
        yield
        cluster.down()


def test_three_nodes_come_and_leave_nothing(idle_machine: None) -> None:
    before = machine_state()
    assert before["directories"] == before["processes"] == before["cgroups"] == ""
    started = time.monotonic()
    layout = cluster.up(3)
    assert time.monotonic() - started < 60
    running = LocalCluster(layout)
    assert [running.node_ready(name) for name in ("n1", "n2", "n3")] == [True, True, True]
    cluster.down()
    assert machine_state() == before
    cluster.down()  # nothing there is no error


@pytest.mark.parametrize("reached", ["processes/etcd.json", "processes/n2.json", "processes/kube-scheduler.json"])
def test_a_start_that_was_killed_leaves_nothing_after_down(idle_machine: None, reached: str) -> None:
    before = machine_state()
    starting = subprocess.Popen([*COMMAND, "up"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    cached = cluster.setup()["etcd"]
    hidden = cached.with_name("hidden")
    cached.rename(hidden)
    try:
        environment = os.environ | {"KUBEBUILDER_ASSETS": str(tmp_path)}
        done = subprocess.run([*COMMAND, "up"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    finally:
        hidden.rename(cached)
    assert done.returncode == 1
    assert done.stderr.endswith("The local cluster: etcd ended at once. Its last words:\nno etcd today\n")
    assert machine_state() == before
