"""Fixtures of the API server tier: ``api_server`` (bare), ``job_server`` (with the Job controller), a namespace each.

def test_something(kube: Kube) -> None:          # a namespace of its own on the bare server
    kube.create({...})

def test_a_job_makes_pods(job_kube: Kube) -> None:  # the same where Jobs make pods; the test plays the kubelet
    ...
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.apiserver.kube import Kube
from tests.apiserver.server import RunningServer, ServerUnavailable, shared_server
from tests.tiers import cannot_run


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """kube-apiserver and etcd with the CRD, no controllers; shared by all workers of this run."""
    yield from _server(tmp_path_factory, "api-server", controllers=False)


@pytest.fixture(scope="session")
def job_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The same with a real controller manager: Jobs make pods, owners' deletion deletes, namespaces end."""
    yield from _server(tmp_path_factory, "job-server", controllers=True)


@pytest.fixture
def kube(api_server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Kube]:
    """An administrator on the bare server whose namespace is this test's own."""
    yield from _kube(api_server, request)


@pytest.fixture
def job_kube(job_server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Kube]:
    """An administrator on the server with the Job controller whose namespace is this test's own."""
    yield from _kube(job_server, request)


@pytest.fixture
def kubeconfig(kube: Kube, tmp_path: Path) -> Path:
    """A kubeconfig file for ``kube``: same server, same identity, same namespace."""
    return kube.server.write_kubeconfig(tmp_path / "kubeconfig", namespace=kube.namespace)


def _server(factory: pytest.TempPathFactory, name: str, *, controllers: bool) -> Iterator[RunningServer]:
    worker = "PYTEST_XDIST_WORKER" in os.environ
    base = factory.getbasetemp()
    root = (base.parent if worker else base) / name
    owner = os.getppid() if worker else os.getpid()
    try:
        with shared_server(root, owner, controllers=controllers) as server:
            yield server
    except ServerUnavailable as error:
        cannot_run("API server", error)


def _kube(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Kube]:
    word = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40].strip("-")
    name = f"{word}-{uuid.uuid4().hex[:6]}"
    with Kube(server, namespace=name) as kube:
        kube.create(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
            }
        )
        # There is no ServiceAccount controller here, and pods are refused without this account.
        kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}})
        yield kube
        kube.delete("Namespace", name)
