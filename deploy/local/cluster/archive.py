"""Images of buildah's storage as OCI archives that carry only the blobs which the receiver lacks.

`buildah push` cannot do this: into an OCI layout (buildah 1.28) it compresses every layer again each time, minutes for
gigabytes of dependencies, whatever --disable-compression says. Layers here stay uncompressed, so the digest of a layer
is known before a byte of it is read.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO, Any

from deploy.local.cluster import builder
from deploy.local.cluster.layout import ClusterError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Image:
    """An image that was built. ``manifest`` and ``config``: the exact bytes that its digests are of."""

    name: str
    manifest: bytes
    config: bytes

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by digest of every blob: layers from the base upwards, configuration, manifest."""
        manifest = json.loads(self.manifest)
        parts = [*manifest["layers"], manifest["config"]]
        return {part["digest"]: int(part["size"]) for part in parts} | {_digest(self.manifest): len(self.manifest)}


def read(name: str) -> Image:
    """The image ``name`` of buildah's storage.

    Raises:
        ClusterError: it was never built, or this buildah stores it in another way than the OCI image format.
    """
    found = builder.inspect(name)
    image = Image(name, found["Manifest"].encode(), found["Config"].encode())
    if _digest(image.config) != json.loads(image.manifest)["config"]["digest"]:
        raise ClusterError(f"buildah gives another configuration of {name} than the image's manifest names.")
    return image


def write(pipe: IO[bytes], image: Image, present: Collection[str]) -> int:
    """Write an OCI image layout (specification 1.1) as tar stream; returns the bytes of the blobs in it.

    ``present``: digests of blobs that the receiver has; they are named by the manifest and left out here.

    Raises:
        ClusterError: buildah's storage has lost a layer.
    """
    sizes = image.sizes
    digest = _digest(image.manifest)
    descriptor = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest,
        "size": sizes[digest],
        "annotations": {"io.containerd.image.name": image.name},
    }
    texts = {digest: image.manifest, _digest(image.config): image.config}
    _member(pipe, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
    _member(pipe, "index.json", json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode())
    layers = {entry.get("diff-digest"): entry["id"] for entry in _stored_layers()}
    missing = [digest for digest in sizes if digest not in present]
    for digest in missing:
        path = f"blobs/{digest.replace(':', '/')}"
        if digest in texts:
            _member(pipe, path, texts[digest])
        elif digest in layers:
            pipe.write(_header(path, sizes[digest]))
            _layer(pipe, layers[digest])
            pipe.write(bytes(-sizes[digest] % tarfile.BLOCKSIZE))
        else:
            raise ClusterError(
                f"The layer {digest} of {image.name} is not in buildah's storage; "
                "run `python -m deploy.local.cluster.images clean` and build again."
            )
    pipe.write(bytes(2 * tarfile.BLOCKSIZE))
    return sum(sizes[digest] for digest in missing)


def _stored_layers() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((builder.storage() / "overlay-layers/layers.json").read_bytes())
    return listed


def _layer(pipe: IO[bytes], identity: str) -> None:
    """The tar of a layer, byte by byte as it was committed: containers/storage keeps its headers in tar-split's format.

    Each line is a segment of raw bytes (type 2) or a file whose content lies in the layer's directory (type 1). The
    receiver computes the digest of what it gets, so a file that was changed is an error there.
    """
    directory = builder.storage() / "overlay" / identity / "diff"
    with gzip.open(builder.storage() / "overlay-layers" / f"{identity}.tar-split.gz") as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["type"] == 2:
                pipe.write(base64.b64decode(entry["payload"]))
            elif entry.get("size"):
                raw = entry.get("name_raw")  # names that are not UTF-8
                name = base64.b64decode(raw) if raw else entry["name"].encode()
                with (directory / name.decode(errors="surrogateescape")).open("rb") as file:
                    shutil.copyfileobj(file, pipe, _CHUNK)


def _member(pipe: IO[bytes], path: str, data: bytes) -> None:
    pipe.write(_header(path, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def _header(path: str, size: int) -> bytes:
    entry = tarfile.TarInfo(path)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
