"""The images of the product: small, without privileges, without traces of the builder; a code change moves its code."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import secrets
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from deploy.local.cluster import archive, builder, golden_store, images, stores
from deploy.local.cluster.layout import ClusterError, Layout, Node
from tests.cluster.cluster import LocalCluster, wait_for

MEGABYTE = 10**6
INPUTS = ("Dockerfile", ".dockerignore", "pyproject.toml", "requirements", "deploy/image", "api/finetune_api",
          "storage/finetune_storage", "trainer/finetune_trainer", "operator/finetune_operator")  # fmt: skip
ENVIRONMENT = {"LANG", "PATH", "HOME", "USER", "LOGNAME", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE",
               "PYTHONSAFEPATH"}  # fmt: skip

LOOK = """
import importlib.util as find, json, os, sys
def writes(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.strerror
    return "yes"
print(json.dumps({
    "user": [os.getuid(), os.getgid(), os.getgroups()],
    "root": writes("/proof"), "code": writes("/app/proof"), "venv": writes("/opt/venv/proof"),
    "tmp": writes("/tmp/proof"),
    "home": os.environ["HOME"], "torch": find.find_spec("torch") is not None,
    "operator": find.find_spec("finetune_operator") is not None,
    "trainer": find.find_spec("finetune_trainer") is not None,
}))
"""


@pytest.fixture(scope="module")
def names(running_cluster: LocalCluster) -> dict[str, str]:
    """Image name by target, of this working tree."""
    return images.build()


@pytest.fixture
def loaded(local_cluster: LocalCluster, names: dict[str, str]) -> dict[str, str]:
    """The same, on all nodes."""
    images.load(local_cluster.layout, names.values())
    return names


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of what images are built from, with one more line of code in the operator."""
    for name in INPUTS:
        source, target = images.REPOSITORY / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    with (tmp_path / "operator/finetune_operator/__main__.py").open("a") as file:
        file.write(f"# {secrets.token_hex(8)}\n")  # never built before
    return tmp_path


def run_in_pod(
    cluster: LocalCluster, namespace: str, image: str, commands: dict[str, list[str]]
) -> dict[str, tuple[int, str]]:
    """Exit code and output by name of the command: one container each, read-only root and a tmpfs at /tmp."""
    security = {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    containers = [
        {
            "name": name,
            "image": image,
            "imagePullPolicy": "Never",
            "command": command,
            "securityContext": security,
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
        for name, command in commands.items()
    ]
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": containers,
        "volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}],
    }
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "look"}, "spec": spec}, namespace=namespace)

    def ended() -> dict[str, Any] | None:
        found = cluster.get("pod", "look", namespace)
        return found if found and found["status"]["phase"] in ("Succeeded", "Failed") else None

    pod = wait_for(ended, 180, "the pod does not end")
    codes = {entry["name"]: entry["state"]["terminated"]["exitCode"] for entry in pod["status"]["containerStatuses"]}
    return {
        name: (codes[name], cluster.kubectl("logs", "look", "--container", name, "--namespace", namespace))
        for name in commands
    }


def config(name: str) -> dict[str, Any]:
    return dict(json.loads(archive.read(name).config))


def members(name: str) -> list[str]:
    """Paths of all files of an image that are not empty, as mount points are; also those that a later layer hides."""
    pipe = io.BytesIO()
    archive.write(pipe, archive.read(name), present=())
    pipe.seek(0)
    found = []
    with tarfile.open(fileobj=pipe) as outer:
        for blob in outer:
            content = outer.extractfile(blob)
            if blob.size > 10 * tarfile.BLOCKSIZE and content:
                with tarfile.open(fileobj=content) as layer:
                    found += [file.name for file in layer if file.size]
    return found


def code_layer(name: str) -> dict[str, int]:
    """Path -> permissions of everything in the last layer."""
    image = archive.read(name)
    code = json.loads(image.manifest)["layers"][-1]["digest"]
    pipe = io.BytesIO()
    archive.write(pipe, image, present=set(image.sizes) - {code})
    pipe.seek(0)
    with tarfile.open(fileobj=pipe) as outer:
        content = outer.extractfile(f"blobs/{code.replace(':', '/')}")
        assert content is not None
        with tarfile.open(fileobj=content) as layer:
            return {entry.name: entry.mode & 0o777 for entry in layer}


def test_the_operator_runs_with_a_read_only_root_as_nobody_special(
    local_cluster: LocalCluster, namespace: str, loaded: dict[str, str]
) -> None:
    commands = {"help": ["python", "-m", "finetune_operator", "--help"], "look": ["python", "-c", LOOK]}
    ended = run_in_pod(local_cluster, namespace, loaded["operator"], commands)
    assert ended["help"][0] == 0, ended["help"][1]
    assert "usage:" in ended["help"][1]
    assert json.loads(ended["look"][1]) == {
        "user": [65532, 65532, [65532]],
        "root": "Read-only file system",
        "code": "Read-only file system",
        "venv": "Read-only file system",
        "tmp": "yes",
        "home": "/tmp",
        "torch": False,
        "operator": True,
        "trainer": False,
    }


def test_the_trainer_imports_everything_with_a_read_only_root_as_nobody_special(
    local_cluster: LocalCluster, namespace: str, loaded: dict[str, str]
) -> None:
    imports = (
        "import deepspeed, bitsandbytes, torch, transformers, peft, finetune_trainer; print('torch', torch.__version__)"
    )
    commands = {"imports": ["python", "-c", imports], "look": ["python", "-c", LOOK]}
    ended = run_in_pod(local_cluster, namespace, loaded["trainer"], commands)
    assert ended["imports"][0] == 0, ended["imports"][1]
    lock_file = (images.REPOSITORY / "requirements/trainer.txt").read_text(encoding="utf-8")
    version = re.search(r"^torch ([\d.]+)", ended["imports"][1], re.MULTILINE)  # libraries may have said more
    assert version is not None, ended["imports"][1]
    assert f"torch=={version[1]} " in lock_file.replace("+", " ")
    assert json.loads(ended["look"][1]) == {
        "user": [65532, 65532, [65532]],
        "root": "Read-only file system",
        "code": "Read-only file system",
        "venv": "Read-only file system",
        "tmp": "yes",
        "home": "/tmp",
        "torch": True,
        "operator": False,
        "trainer": True,
    }


def test_the_operator_image_has_at_most_200_megabytes(names: dict[str, str]) -> None:
    assert sum(archive.read(names["operator"]).sizes.values()) <= 200 * MEGABYTE


def test_nothing_moves_when_nothing_changed(
    names: dict[str, str], changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = images.build(["operator"], changed)
    assert "golden image store" in capsys.readouterr().err
    assert images.build(["operator"], changed) == first
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("waiting for another")]
    assert said == []


def test_a_node_that_has_the_images_is_sent_nothing(local_cluster: LocalCluster, loaded: dict[str, str]) -> None:
    sockets = [local_cluster.layout.containerd_socket(node) for node in local_cluster.layout.nodes]
    assert [golden_store.import_image(socket, name) for socket in sockets for name in loaded.values()] == [0] * 4


def test_a_code_change_changes_the_last_layer_and_moves_two_megabytes_at_most(
    local_cluster: LocalCluster, loaded: dict[str, str], changed: Path
) -> None:
    name = images.build(["operator"], changed)["operator"]
    before, after = archive.read(loaded["operator"]), archive.read(name)
    old, new = (json.loads(image.manifest)["layers"] for image in (before, after))
    assert name != loaded["operator"]
    assert images.current()["operator"] != name  # of another tree
    assert new[:-1] == old[:-1]
    assert new[-1] != old[-1]
    moved = sum(size for digest, size in after.sizes.items() if digest not in before.sizes)
    assert moved <= 2 * MEGABYTE
    node = local_cluster.layout.nodes[0]
    with stores.locked():
        assert golden_store.import_image(local_cluster.layout.containerd_socket(node), name) == moved


def test_a_change_of_the_trainers_code_is_no_change_of_the_operator(changed: Path) -> None:
    tags = {target: images.tag(image, changed) for target, image in images.IMAGES.items()}
    keys = {target: images.dependencies_key(image, changed) for target, image in images.IMAGES.items()}
    with (changed / "trainer/finetune_trainer/__main__.py").open("a") as file:
        file.write("# changed\n")
    assert images.tag(images.IMAGES["operator"], changed) == tags["operator"]
    assert images.tag(images.IMAGES["trainer"], changed) != tags["trainer"]
    assert {target: images.dependencies_key(image, changed) for target, image in images.IMAGES.items()} == keys


def test_an_archive_is_the_image_that_was_built(names: dict[str, str]) -> None:
    image = archive.read(names["operator"])
    pipe = io.BytesIO()
    assert archive.write(pipe, image, present=()) == sum(image.sizes.values())
    pipe.seek(0)
    found = {}
    with tarfile.open(fileobj=pipe) as outer:
        for member in outer:
            content = outer.extractfile(member)
            assert content is not None
            if member.name.startswith("blobs/"):
                found["sha256:" + hashlib.file_digest(content, "sha256").hexdigest()] = member.size
    assert found == image.sizes


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_the_configuration_tells_nothing_of_the_builder(target: str, names: dict[str, str]) -> None:
    found = config(names[target])
    of_its_own = {"LD_LIBRARY_PATH"} if target == "trainer" else set()  # where GKE mounts NVIDIA's driver
    assert {entry.partition("=")[0] for entry in found["config"]["Env"]} == ENVIRONMENT | of_its_own
    assert found["config"]["User"] == "65532:65532"
    assert found["config"]["Entrypoint"] == ["python", "-m", f"finetune_{target}"]
    assert found["config"]["WorkingDir"] == "/tmp"
    text = json.dumps(found)
    for mounted in ("/root/.cache/uv", "/root/.netrc"):  # there the Dockerfile has uv's cache and a secret, if any
        text = text.replace(mounted, "")
    places = [str(images.REPOSITORY), str(builder.directory()), str(Path.home())]
    assert [place for place in places if place in text] == []


def test_no_layer_keeps_what_only_the_build_needed(names: dict[str, str]) -> None:
    paths = members(names["operator"])
    assert "app/finetune_operator/__main__.py" in paths
    unwanted = ("root/.cache/", "usr/local/bin/uv", "tmp/", "src/", "var/lib/apt/lists/", "var/cache/apt/")
    # the lock file came as a layer of its own; it is public, and hidden by the next layer
    assert [path for path in paths if path.startswith(unwanted)] == ["tmp/requirements.txt"]
    assert [path for path in paths if path.startswith("app/") and "finetune_trainer" in path] == []


def test_the_code_layer_names_no_place_of_the_builder(names: dict[str, str]) -> None:
    image = archive.read(names["trainer"])
    code = json.loads(image.manifest)["layers"][-1]["digest"]
    pipe = io.BytesIO()
    archive.write(pipe, image, present=set(image.sizes) - {code})
    assert str(images.REPOSITORY).encode() not in pipe.getvalue()


def test_a_checkout_that_only_its_owner_may_read_gives_the_same_code_layer(
    names: dict[str, str], changed: Path
) -> None:
    for path in (changed, *changed.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    entries = code_layer(images.build(["operator"], changed)["operator"])
    ours = {path: mode for path, mode in entries.items() if path.startswith("app/")}
    assert {"app/finetune_operator/__main__.py", "app/finetune_api/spec.py"} <= ours.keys()
    assert {path: oct(mode) for path, mode in ours.items() if mode not in (0o644, 0o755)} == {}
    assert ours == {path: mode for path, mode in code_layer(names["operator"]).items() if path.startswith("app/")}


@contextmanager
def package_index() -> Iterator[tuple[str, list[str]]]:
    """URL of an index with no packages that asks for a password, and every password that it was told."""
    told: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scheme, _, secret = self.headers.get("Authorization", "").partition(" ")
            if scheme == "Basic":
                told.append(base64.b64decode(secret).decode())
            self.send_response(404 if scheme == "Basic" else 401)
            self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple", told
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("target", ["operator", "trainer"])
def test_a_mirrors_password_comes_from_the_netrc_that_the_builder_was_given(
    target: str, names: dict[str, str], tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password from-a-secret\n")
    mounts = ("--volume", f"{builder.uv()}:/usr/local/bin/uv:ro")
    options = ("--isolation", "chroot", "--network", "host", "--layers", "--force-rm", *mounts)
    with package_index() as (url, told), stores.locked():
        arguments = ("--build-arg", f"BASE={builder.BASE}", "--build-arg", f"PACKAGE_INDEX={url}")
        for secret in ((), ("--secret", f"id=netrc,src={netrc}")):
            with pytest.raises(ClusterError):  # it has no packages
                builder._buildah(
                    "bud", *options, *arguments, *secret, "--target", f"{target}-deps", str(images.REPOSITORY)
                )
            assert set(told) == ({"me:from-a-secret"} if secret else set())


def test_a_node_waits_for_an_import_before_it_copies_the_golden_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path / "cache"))
    database = stores.golden() / "io.containerd.metadata.v1.bolt" / "meta.db"
    database.parent.mkdir(parents=True)
    database.write_text("torn")
    layout, node = Layout(tmp_path / "state", tmp_path / "disk", (Node(1),)), Node(1)
    filling = threading.Thread(target=stores.fill, args=(layout, node))
    with stores.locked():
        filling.start()
        filling.join(0.5)
        assert not layout.node_disk(node).exists()
        database.write_text("whole")
    filling.join(20)
    copied = layout.node_disk(node) / "containerd" / database.relative_to(stores.golden())
    assert copied.read_text() == "whole"


def test_an_unknown_image_is_refused_in_a_sentence() -> None:
    command = ["python3", "-m", "deploy.local.cluster.images", "build", "trainr"]
    done = subprocess.run(command, cwd=images.REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "There is no image 'trainr'; there are operator and trainer.\n")
