"""The golden containerd store, which nodes copy by hard links, and imports that move only what a store lacks.

An import is an OCI archive on ctr's standard input. It names every blob of the image and carries those that the store
does not have, so a code change costs the last small layer, in the golden store as in a node that runs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.local.cluster import builder, stores
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
_START_SECONDS = 20.0


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
    with log.open("wb") as output:
        daemon = subprocess.Popen([program("containerd"), "--config", config], stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(socket):
            if daemon.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-1500:]
                raise ClusterError(f"containerd does not start over {stores.golden()}. The end of its log:\n{tail}")
            time.sleep(0.05)
        yield socket
    finally:
        daemon.terminate()
        daemon.wait(timeout=30)
    shutil.rmtree(_work())


def import_pause(socket: Path) -> None:
    """The image of every pod's first container."""
    if PAUSE_IMAGE not in _ctr(socket, "images", "ls", "--quiet").split():
        _ctr(socket, "images", "import", "--local", str(stores.pause_archive()))


def import_image(socket: Path, name: str) -> None:
    """Import an exported image into the containerd behind ``socket``; one that is there is left alone.

    Raises:
        ClusterError: the image was never exported, or containerd refuses it.
    """
    if name in _ctr(socket, "images", "ls", "--quiet").split():
        return
    descriptor = _exported()[name]
    present = set(_ctr(socket, "content", "ls", "--quiet").split())
    missing = [digest for digest in _blobs(descriptor) if digest not in present]
    command = [
        str(program("ctr")),
        "--address",
        str(socket),
        "--namespace",
        "k8s.io",
        "images",
        "import",
        "--local",
        "-",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin is not None
    problem = ""
    try:
        with process.stdin as pipe:
            _write_archive(pipe, name, descriptor, missing)
    except BrokenPipeError:
        problem = "it closed the archive before its end; "
    output = process.stdout.read().decode(errors="replace") if process.stdout else ""
    if process.wait() != 0 or problem:
        raise ClusterError(f"containerd does not import {name}: {problem}{output.strip()[-1500:]}")


def remove_images(socket: Path, names: list[str]) -> None:
    """Remove images from the golden store and the exported layers, with what only they need."""
    _ctr(socket, "images", "rm", "--sync", *names)
    index_file = builder.layers() / "index.json"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["manifests"] = [entry for entry in index["manifests"] if _name(entry) not in names]
    index_file.write_text(json.dumps(index), encoding="utf-8")
    needed = {digest.partition(":")[2] for entry in index["manifests"] for digest in _blobs(entry)}
    for path in (builder.layers() / "blobs/sha256").iterdir():
        if path.name not in needed:
            path.unlink()


def share_blobs() -> None:
    """Make the exported layers links to the golden store's own, which are the same bytes: saves gigabytes."""
    for path in (builder.layers() / "blobs/sha256").iterdir():
        original = stores.golden() / "io.containerd.content.v1.content/blobs/sha256" / path.name
        if original.is_file() and not original.samefile(path):
            link = path.with_suffix(".new")
            link.unlink(missing_ok=True)
            os.link(original, link)
            link.replace(path)


def _write_archive(pipe: Any, name: str, descriptor: dict[str, Any], digests: list[str]) -> None:
    named = {**descriptor, "annotations": {"io.containerd.image.name": name}}
    texts = {
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
        "index.json": {"schemaVersion": 2, "manifests": [named]},
    }
    with tarfile.open(fileobj=pipe, mode="w|") as archive:
        for path, value in texts.items():
            data = json.dumps(value).encode()
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for digest in digests:
            blob = _blob(digest)
            entry = tarfile.TarInfo(f"blobs/{digest.replace(':', '/')}")
            entry.size = blob.stat().st_size
            with blob.open("rb") as file:
                archive.addfile(entry, file)


def _exported() -> dict[str, dict[str, Any]]:
    index = json.loads((builder.layers() / "index.json").read_text(encoding="utf-8"))
    return {_name(entry): entry for entry in index["manifests"]}


def _blobs(descriptor: dict[str, Any]) -> list[str]:
    """Digests of an image: layers, configuration, and the manifest last."""
    manifest = json.loads(_blob(descriptor["digest"]).read_text(encoding="utf-8"))
    parts = [*manifest["layers"], manifest["config"], descriptor]
    return list(dict.fromkeys(part["digest"] for part in parts))


def _blob(digest: str) -> Path:
    return builder.layers() / "blobs" / digest.replace(":", "/")


def _name(entry: dict[str, Any]) -> str:
    return str(entry.get("annotations", {}).get("org.opencontainers.image.ref.name", ""))


def _work() -> Path:
    return builder.directory() / "golden-containerd"


def _answers(socket: Path) -> bool:
    command = [str(program("ctr")), "--address", str(socket), "version"]
    return socket.exists() and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _ctr(socket: Path, *arguments: str) -> str:
    return run(program("ctr"), "--address", socket, "--namespace", "k8s.io", *arguments)
