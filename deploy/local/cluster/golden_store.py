"""The golden containerd store, of which nodes have views, and imports that move only what a store lacks.

An import is an OCI archive on ctr's standard input. It names every blob of the image and carries those that the store
does not have, so a code change costs the last small layer, in the golden store as in a node that runs.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.cluster import archive, builder, stores
from deploy.local.cluster.layout import PAUSE_IMAGE, ClusterError
from deploy.local.cluster.processes import run
from deploy.local.cluster.tools import program

_CONFIG = """version = 3
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt",
]
[grpc]
  address = "{socket}"
"""
_START_SECONDS = 60.0


def exists() -> bool:
    return stores.golden().is_dir()


def paths() -> list[Path]:
    """What `containerd` makes."""
    return [stores.golden(), _work()]


@contextmanager
def containerd() -> Iterator[Path]:
    """A containerd over the golden store, for imports only; yields its socket.

    Raises:
        ClusterError: it does not start; with the end of its log.
    """
    shutil.rmtree(_work(), ignore_errors=True)
    _work().mkdir(parents=True)
    socket, log = _work() / "containerd.sock", _work() / "log"
    config = _work() / "config.toml"
    config.write_text(_CONFIG.format(root=stores.golden(), state=_work() / "state", socket=socket), encoding="utf-8")
    # It dies with us: one that outlived a killed builder would hold the store's database for ever.
    command = ["setpriv", "--pdeathsig", "KILL", program("containerd"), "--config", config]
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not answers(socket):
            if daemon.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-1500:]
                raise ClusterError(f"containerd does not start over {stores.golden()}. The end of its log:\n{tail}")
            time.sleep(0.05)
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(timeout=120)
    shutil.rmtree(_work())


def answers(socket: Path) -> bool:
    """Whether a containerd serves there."""
    command = [str(program("ctr")), "--address", str(socket), "version"]
    return socket.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def import_pause(socket: Path) -> None:
    """The image of every pod's first container."""
    if PAUSE_IMAGE not in _ctr(socket, "images", "ls", "--quiet").split():
        _ctr(socket, "images", "import", "--local", str(stores.pause_archive()))


def import_image(socket: Path, name: str) -> int:
    """Import a built image into the containerd behind ``socket``; returns the bytes of blobs moved, 0 if it was there.

    Raises:
        ClusterError: the image was never built, or containerd refuses it.
    """
    if name in _ctr(socket, "images", "ls", "--quiet").split():
        return 0
    image = archive.read(name)
    present = set(_ctr(socket, "content", "ls", "--quiet").split())
    words = ["--address", str(socket), "--namespace", "k8s.io", "images", "import", "--local", "-"]
    process = subprocess.Popen(
        [program("ctr"), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    moved, problem = 0, ""
    try:
        with process.stdin as pipe:
            moved = archive.write(pipe, image, present)
    except BrokenPipeError:
        problem = "it closed the archive before its end; "
    output = process.stdout.read().decode(errors="replace")
    if process.wait() != 0 or problem:
        raise ClusterError(f"containerd does not import {name}: {problem}{output.strip()[-1500:]}")
    return moved


def remove_images(socket: Path, names: list[str]) -> None:
    """Remove images from the golden store, with what only they need."""
    _ctr(socket, "images", "rm", "--sync", *names)


def _work() -> Path:
    return builder.directory() / "golden-containerd"


def _ctr(socket: Path, *arguments: str) -> str:
    return run(program("ctr"), "--address", socket, "--namespace", "k8s.io", *arguments)
