"""The images of the product, built from the Dockerfile on this machine and brought into the cluster.

python -m deploy.local.cluster.images build [operator|trainer ...] [--load]   into the golden store (and running nodes)
python -m deploy.local.cluster.images load                                    the current images into running nodes
python -m deploy.local.cluster.images list                                    names of the current images
python -m deploy.local.cluster.images clean                                   remove all images and stores

There is no registry and no Docker: debootstrap makes the base, buildah builds, containerd imports. A tag is a digest
of everything that goes into the image, so an unchanged tree costs a few file reads. Everything lies in ``images`` under
the tools cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local.cluster import builder, cluster, golden_store, machine, stores
from deploy.local.cluster.layout import ClusterError, Layout

REPOSITORY = Path(__file__).resolve().parents[3]
KEPT_TAGS = 3
"""Per image: the current one and a few to go back to; only code layers differ, so they cost little."""


@dataclass(frozen=True)
class Image:
    """One target of the Dockerfile."""

    target: str
    packages: tuple[str, ...]
    minutes: float  # for the dependencies, on two cores with uv's cache warm

    @property
    def repository(self) -> str:
        return f"localhost/finetune-{self.target}"

    @property
    def lock_file(self) -> str:
        return f"requirements/{self.target}.txt"

    def name(self, tag: str) -> str:
        return f"{self.repository}:{tag}"

    def dependencies_name(self, key: str) -> str:
        return f"localhost/{self.target}-deps:{key}"


IMAGES = {
    image.target: image
    for image in (
        Image("operator", ("api/finetune_api", "operator/finetune_operator"), 0.1),
        Image("trainer", ("api/finetune_api", "storage/finetune_storage", "trainer/finetune_trainer"), 2.5),
    )
}


def build(targets: Sequence[str] = tuple(IMAGES), tree: Path = REPOSITORY) -> dict[str, str]:
    """Build what changed, import it into the golden store, and return image name by target.

    The images of this repository become the `current` ones; those of another ``tree`` do not.

    Raises:
        ClusterError: a package of this machine is missing or a build failed; the text says which.
    """
    machine.require_root()
    with stores.locked():
        wanted = {target: tag(IMAGES[target], tree) for target in targets}
        built = _read("built.json")
        stale = [
            target for target in targets if wanted[target] not in [entry["tag"] for entry in built.get(target, [])]
        ]
        if not golden_store.exists():
            stale = list(targets)
        if stale:
            _build_all(stale, wanted, tree, built)
        for target in targets:  # the current one moves to the end, so that it is forgotten last
            entries = built[target]
            entries.sort(key=lambda entry, current=wanted[target]: entry["tag"] == current)
        if stale and Layout.recorded() is None:  # nodes of a cluster use the golden store's layers in place
            _forget_old(built)
        _write("built.json", built)
        if tree == REPOSITORY:
            _write("tags.json", {**_read("tags.json"), **wanted})
    return {target: IMAGES[target].name(wanted[target]) for target in targets}


def current() -> dict[str, str]:
    """Image name by target, as last built.

    Raises:
        ClusterError: nothing was built yet.
    """
    tags = _read("tags.json")
    if not tags:
        raise ClusterError("No images have been built; run `python -m deploy.local.cluster.images build`.")
    return {target: IMAGES[target].name(value) for target, value in tags.items()}


def load(layout: Layout, names: Collection[str] = ()) -> None:
    """Import built images (none named: the current ones) into every running node; only what a node lacks moves.

    Raises:
        ClusterError: nothing was built, or a node is off.
    """
    with stores.locked():
        for name in names or current().values():
            for node in layout.nodes:
                socket = layout.containerd_socket(node)
                if not golden_store.answers(socket):
                    raise ClusterError(
                        f"Node {node.name} is off or its containerd is dead; "
                        f"`python -m deploy.local.cluster node boot {node.name}` starts it, then load the images again."
                    )
                with _step(f"{name} into {node.name}"):
                    golden_store.import_image(socket, name)


def clean() -> None:
    """Remove every image, layer and store; the next build starts from nothing."""
    with stores.locked():
        builder.clean()
        for name in ("tags.json", "built.json"):
            (builder.directory() / name).unlink(missing_ok=True)
        for path in golden_store.paths():
            shutil.rmtree(path, ignore_errors=True)


def tag(image: Image, tree: Path = REPOSITORY) -> str:
    """12 hex digits of everything that decides the image's content: build recipe, lock file, code, base."""
    files = [tree / "Dockerfile", tree / ".dockerignore", tree / "pyproject.toml", tree / image.lock_file]
    files += sorted((tree / "deploy/image").glob("*.py"))
    for package in image.packages:
        files += sorted(
            path for path in (tree / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
    digest = hashlib.sha256(builder.BASE.encode())
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(tree)} {content}\n".encode())
    return digest.hexdigest()[:12]


def dependencies_key(image: Image, tree: Path = REPOSITORY) -> str:
    """12 hex digits of what decides the dependency layer: base, lock file and that stage of the Dockerfile."""
    stages = (tree / "Dockerfile").read_text(encoding="utf-8").split("\nFROM ")
    stage = next(text for text in stages if text.splitlines()[0].endswith(f" AS {image.target}-deps"))
    lock_file = (tree / image.lock_file).read_text(encoding="utf-8")
    return hashlib.sha256("\0".join([builder.BASE, stage, lock_file]).encode()).hexdigest()[:12]


def _build_all(
    targets: Sequence[str], wanted: dict[str, str], tree: Path, built: dict[str, list[dict[str, str]]]
) -> None:
    builder.require_packages()
    if not builder.has(builder.BASE):
        with _step(f"base system {builder.BASE} (about a minute, once)"):
            builder.make_base()
    for target in targets:
        image, key = IMAGES[target], dependencies_key(IMAGES[target], tree)
        dependencies, name = image.dependencies_name(key), image.name(wanted[target])
        if not builder.has(dependencies):
            with _step(f"dependencies of the {target} (about {image.minutes} minutes, once per lock file)"):
                builder.build(tree, f"{target}-deps", dependencies)
        with _step(f"image {name}"):
            builder.build(tree, target, name)
        entries = [entry for entry in built.get(target, []) if entry["tag"] != wanted[target]]
        built[target] = [*entries, {"tag": wanted[target], "dependencies": key}]
    with _step("golden image store"), golden_store.containerd() as socket:
        golden_store.import_pause(socket)
        for target in targets:
            golden_store.import_image(socket, IMAGES[target].name(wanted[target]))


def _forget_old(built: dict[str, list[dict[str, str]]]) -> None:
    """Keep a few tags on the current dependencies. Older dependencies cost gigabytes and go at once."""
    dropped = []
    for target, entries in built.items():
        newest = entries[-1]["dependencies"]
        kept = [entry for entry in entries if entry["dependencies"] == newest][-KEPT_TAGS:]
        image = IMAGES[target]
        dropped += [image.name(entry["tag"]) for entry in entries if entry not in kept]
        keys = {entry["dependencies"] for entry in entries} - {newest}
        dropped += [image.dependencies_name(key) for key in sorted(keys)]
        entries[:] = kept
    if not dropped:
        return
    with _step(f"removing {len(dropped)} old images"), golden_store.containerd() as socket:
        golden_store.remove_images(socket, dropped)
        builder.remove(dropped)


@contextmanager
def _step(what: str) -> Iterator[None]:
    start = time.monotonic()
    print(f"images: {what} ...", file=sys.stderr, flush=True)
    yield
    print(f"images: {what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _read(name: str) -> dict:  # type: ignore[type-arg]  # two small files of ours
    path = builder.directory() / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(name: str, value: object) -> None:
    path = builder.directory() / name
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 after one sentence on the standard error stream."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local.cluster.images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("build")
    making.add_argument("targets", nargs="*", metavar="operator|trainer")
    making.add_argument("--load", action="store_true", help="also into the nodes of the running cluster")
    for name in ("load", "list", "clean"):
        actions.add_parser(name)
    options = parser.parse_args(arguments)
    try:
        if options.action == "build":
            if unknown := sorted(set(options.targets) - set(IMAGES)):
                raise ClusterError(f"There is no image {unknown[0]!r}; there are {' and '.join(IMAGES)}.")
            names = build(options.targets or tuple(IMAGES)).values()
            print("\n".join(names))
            if options.load:
                load(cluster.require_running(), names)
        if options.action == "list":
            print("\n".join(current().values()))
        if options.action == "load":
            load(cluster.require_running())
        if options.action == "clean":
            clean()
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
