"""Image stores of the nodes: views of one golden containerd root, so that gigabytes cost nothing."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.cluster import processes
from deploy.local.cluster.layout import PAUSE_IMAGE, ClusterError, Layout, Node, tools_cache
from deploy.local.cluster.oci import write_image
from deploy.local.cluster.tools import build_program, program

_LAYERS = "io.containerd.snapshotter.v1.overlayfs/snapshots"


def golden() -> Path:
    """A containerd root that holds every image of the cluster; made by ``images.py``, may be absent."""
    return tools_cache() / "images" / "golden"


@contextmanager
def locked(*, shared: bool = False) -> Iterator[None]:
    """Alone with the images of this machine, to build, import or remove; or ``shared`` with others that only read."""
    directory = tools_cache() / "images"
    directory.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that builds or loads images", file=sys.stderr, flush=True)
            fcntl.flock(lock, kind)
        yield


def fill(layout: Layout, node: Node) -> None:
    """Give a node that was never booted its own view of the golden store; without one it starts empty.

    Blobs are hard links; the trees of unpacked layers, a hundred thousand files, are symbolic links to directories that
    overlayfs reads only; databases change in place and are real copies.
    """
    store = layout.node_disk(node) / "containerd"
    if store.exists() or not golden().is_dir():
        return
    with locked(shared=True):  # a containerd that imports changes the databases
        _link(store)


def _link(store: Path) -> None:
    layers = golden() / _LAYERS
    for directory, names, files in os.walk(golden()):
        source = Path(directory)
        target = store / source.relative_to(golden())
        target.mkdir(parents=True)
        target.chmod(source.stat().st_mode)
        if source == layers:
            for name in names:
                (target / name).symlink_to(source / name)
            names.clear()
        for name in files:
            copy = shutil.copy2 if name.endswith(".db") else os.link
            copy(source / name, target / name)


def load(layout: Layout, archive: Path, nodes: tuple[Node, ...] | None = None) -> None:
    """Import an image archive (OCI or docker) into running nodes.

    Raises:
        ClusterError: the archive is none, or a node is off.
    """
    for node in nodes or layout.nodes:
        socket = layout.containerd_socket(node)
        processes.run(program("ctr"), "-a", socket, "-n", "k8s.io", "images", "import", "--local", archive)


def images(layout: Layout, node: Node) -> list[str]:
    """Names of the images that a running node has."""
    listed = processes.run(
        program("ctr"), "-a", layout.containerd_socket(node), "-n", "k8s.io", "images", "ls", "--quiet"
    )
    return sorted(line for line in listed.split() if not line.startswith("sha256:"))


def ensure_pause(layout: Layout) -> None:
    """Without the pause image no pod starts: import one into nodes that lack it.

    Raises:
        ClusterError: it cannot be built.
    """
    for node in layout.nodes:
        processes.wait_until(
            layout.containerd_socket(node).exists,
            20,
            f"containerd of {node.name} does not start",
            layout.node_state(node) / "log" / "containerd.log",
        )
        if golden().is_dir() and PAUSE_IMAGE not in images(layout, node):
            raise ClusterError(f"The image store {golden()} lacks {PAUSE_IMAGE}; remove the directory and build again.")
        if not golden().is_dir():
            load(layout, pause_archive(), (node,))


def pause_archive() -> Path:
    """An archive of the pause image, built once."""
    archive = tools_cache() / "pause-1" / "image.tar"
    if not archive.is_file():
        write_image(archive, PAUSE_IMAGE, build_program("pause", "1"), user="65535:65535")
    return archive
