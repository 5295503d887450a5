"""Fixtures of the cluster tests: one real cluster for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.local.cluster.oci import write_image
from deploy.local.cluster.tools import build_program
from tests.cluster.cluster import PROBE_IMAGE, LocalCluster, shared_cluster, undisturbed
from tests.cluster.workshop import Adapter, Workshop, install, put_ground, workshop

# More than all deadlines of a test one after the other, and the first test also builds images and starts the cluster:
# what is late is told by its own deadline, with the story, and not by pytest.
_TIMEOUT_SECONDS = 1800


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a machine without a cluster come before those that share one."""
    items.sort(key=lambda item: item.path.name != "test_clean_up.py")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(_TIMEOUT_SECONDS))


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[LocalCluster]:
    """Use `local_cluster` or `breakable_cluster` in tests; this one is for fixtures that prepare a session."""
    with shared_cluster() as found:
        yield found


@pytest.fixture
def local_cluster(running_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster whose nodes nobody breaks during the test."""
    with undisturbed(exclusive=False):
        yield running_cluster


@pytest.fixture
def breakable_cluster(running_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster that this test has for itself and may break; it is repaired afterwards."""
    with undisturbed(exclusive=True):
        try:
            yield running_cluster
        finally:
            running_cluster.repair()


@pytest.fixture
def namespace(running_cluster: LocalCluster) -> Iterator[str]:
    """A new `restricted` namespace, deleted after the test."""
    with running_cluster.namespace() as name:
        yield name


@pytest.fixture(scope="session")
def probe_image(running_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image on all nodes that serves its name on port 8000 (see deploy/local/cluster/tools/probe)."""
    archive = tmp_path_factory.mktemp("probe") / "image.tar"
    write_image(archive, PROBE_IMAGE, build_program("probe", "1"), user="65532:65532")
    running_cluster.load_image(archive)
    return PROBE_IMAGE


@pytest.fixture(scope="session")
def product(running_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> LocalCluster:
    """The cluster with this working tree's operator installed by Helm, and a model and data in its bucket."""
    install(running_cluster)
    put_ground(running_cluster, tmp_path_factory.mktemp("ground"))
    return running_cluster


@pytest.fixture
def shop(product: LocalCluster) -> Iterator[Workshop]:
    """Jobs on a cluster whose nodes nobody breaks meanwhile."""
    with undisturbed(exclusive=False), workshop(product) as found:
        yield found


@pytest.fixture
def fault_shop(product: LocalCluster) -> Iterator[Workshop]:
    """Jobs on a cluster that this test has for itself and may break."""
    with undisturbed(exclusive=True):
        try:
            with workshop(product) as found:
                yield found
        finally:
            product.repair()


@pytest.fixture(scope="session")
def calm(product: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """The adapter of the long job when nothing happens to it."""
    with undisturbed(exclusive=True), workshop(product) as shop:
        shop.submit(shop.long_job())
        status = shop.wait("job", "Complete")
        assert [attempt["cause"] for attempt in status["attempts"]] == ["Completed"]
        return shop.adapter(status, tmp_path_factory.mktemp("calm") / "artifact")
