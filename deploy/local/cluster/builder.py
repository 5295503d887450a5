"""buildah with a storage of its own: the base system and builds of the Dockerfile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploy.local.cluster import machine
from deploy.local.cluster.layout import ClusterError, tools_cache
from deploy.local.cluster.processes import run

_SUITE = "bookworm"
BASE = f"localhost/base:{_SUITE}-python3.11-1"
"""Stands in for the public Python image; the last number changes when `make_base` does."""
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def directory() -> Path:
    """Where images, layers and tags are kept, outside the repository."""
    return tools_cache().absolute() / "images"


def storage() -> Path:
    """Images and layers as buildah keeps them (containers/storage, overlay driver)."""
    return directory() / "storage"


def require_packages() -> None:
    """Raises:
    ClusterError: buildah or debootstrap is not installed.
    """
    missing = [name for name in ("buildah", "debootstrap") if name in machine.missing_packages()]
    if missing:
        raise ClusterError(
            f"Building images needs {' and '.join(missing)}; install: "
            f"apt-get install --yes --no-install-recommends {' '.join(missing)}"
        )


def has(name: str) -> bool:
    """Whether the storage holds the image."""
    return name in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()


def make_base() -> None:
    """A minimal Debian with Python's standard library and CA certificates, as image `BASE` (about 118 MB, a minute)."""
    root = directory() / "base.new"
    shutil.rmtree(root, ignore_errors=True)
    packages = "python3-minimal,libpython3-stdlib,ca-certificates"
    run("debootstrap", "--variant=minbase", f"--include={packages}", "--exclude=e2fsprogs", _SUITE, root, *_mirror())
    for pattern in ("var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*", "usr/share/doc/*", "usr/share/man/*",
                    "usr/share/locale/*", "usr/share/info/*"):  # fmt: skip
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    container = _buildah("from", "scratch").strip()
    _buildah("add", "--quiet", container, str(root), "/")
    _buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", "--env", "LANG=C.UTF-8", container)
    _buildah("commit", "--quiet", "--rm", "--timestamp", "0", container, BASE)
    shutil.rmtree(root)


def build(tree: Path, target: str, name: str) -> None:
    """Build one target of ``tree``'s Dockerfile as image ``name``.

    uv, its cache and the CA bundle of this machine are mounted for the time of the build and stay in no layer.

    Raises:
        ClusterError: the build failed; with the end of its output.
    """
    cache = Path(run(uv(), "cache", "dir").strip())
    cache.mkdir(parents=True, exist_ok=True)
    mounts = [f"{uv()}:/usr/local/bin/uv:ro", f"{cache}:/root/.cache/uv:rw"]
    bundle = Path(os.environ.get("SSL_CERT_FILE") or _CA_BUNDLE)
    if bundle.is_file():
        mounts.append(f"{bundle}:{_CA_BUNDLE}:ro")
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    options = ["--isolation", "chroot", "--network", "host", "--layers", "--force-rm", "--quiet", *volumes]
    _buildah("bud", *options, "--build-arg", f"BASE={BASE}", "--target", target, "--tag", name, str(tree))


def inspect(name: str) -> dict[str, Any]:
    """What buildah knows of an image; ``Manifest`` and ``Config`` are the texts of the OCI documents.

    Raises:
        ClusterError: there is no such image.
    """
    found: dict[str, Any] = json.loads(_buildah("inspect", "--type", "image", name))
    return found


def remove(names: list[str]) -> None:
    """Remove images and the intermediate ones that nothing needs any more."""
    for name in names:
        if has(name):
            _buildah("rmi", name)
    _buildah("rmi", "--prune")


def clean() -> None:
    """Remove buildah's storage, also after a build was killed."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    ours = (storage(), directory() / "base.new")
    for mount in sorted((each for each in mounts if any(map(Path(each).is_relative_to, ours))), reverse=True):
        run("umount", "--lazy", mount)
    for path in (storage(), directory() / "run", directory() / "base.new"):
        shutil.rmtree(path, ignore_errors=True)


def uv() -> Path:
    """The uv program itself: a version manager's wrapper script would not run inside a build.

    Raises:
        ClusterError: there is none.
    """
    places = [Path(".uv/bin/uv"), Path(shutil.which("uv") or "uv"), Path(sys.base_prefix) / "bin/uv"]
    for place in places:
        if place.is_file():
            with place.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    return place.resolve()
    raise ClusterError("Building images needs uv and none is installed; `make install` puts one into .uv/bin.")


def _mirror() -> list[str]:
    """The Debian mirror that this machine uses; none leaves the choice to debootstrap."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    lines = sources.read_text(encoding="utf-8").splitlines() if sources.is_file() else []
    return [line.split()[1] for line in lines if line.startswith("URIs:")][:1]


def _buildah(command: str, *arguments: str) -> str:
    place = ["--root", str(storage()), "--runroot", str(directory() / "run")]
    words = ["buildah", *place, "--storage-driver", "overlay", command, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"`buildah {command}` failed: {(done.stderr or done.stdout).strip()[-3000:]}")
    return done.stdout
