"""Publication onto a directory and onto a real S3 server, undisturbed and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_storage import DamagedBundle, ObjectStore, StorageError, fetch_artifact, find_artifact, verify_bundle
from finetune_trainer.publish import ArtifactDescription, package_versions, publish

DESCRIPTION = ArtifactDescription(
    job={"namespace": "default", "name": "job", "uid": "u1"},
    format="Adapter",
    base_model={"uri": "hf://org/base", "revision": "0" * 40, "configSha256": "1" * 64},
    dataset={"digest": "2" * 64, "counts": {"train": 10}},
    seed=42,
    config={"model": {"uri": "hf://org/base"}},
    plan={"worldSize": 2},
    metrics={"validationLoss": 1.5},
)


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "file":
        yield ObjectStore.open(f"file://{tmp_path}/out/default/job/u1")
    else:
        server: Any = request.getfixturevalue("s3_server")
        yield ObjectStore.open(f"s3://bucket/{tmp_path.name}/job/u1", environment=server.environment, retry_seconds=5)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    return directory


def test_an_artifact_is_published_verified_and_fetched(store: ObjectStore, artifact: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"steps": []}')
    published = publish(store, artifact, DESCRIPTION, {"report.json": report})
    assert (published.files, published.bytes) == (3, 2 + 7000 + 13)
    assert published.uri.startswith(f"{store.uri}artifacts/")
    manifest = fetch_artifact(store, tmp_path / "copy", manifest_sha256=published.manifest_sha256)
    paths = [entry.path for entry in manifest.files]
    assert paths == ["adapter_config.json", "adapter_model.safetensors", "report.json"]
    assert manifest.base_model == DESCRIPTION.base_model
    assert manifest.versions == package_versions()
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == b"weights" * 1000
    assert fetch_artifact(store.at(published.uri), tmp_path / "other") == manifest


def test_publishing_twice_changes_nothing(store: ObjectStore, artifact: Path) -> None:
    first = publish(store, artifact, DESCRIPTION)
    listed = store.list()
    assert publish(store, artifact, DESCRIPTION) == first
    assert store.list() == listed


def test_a_later_report_on_the_same_weights_makes_no_second_artifact(
    store: ObjectStore, artifact: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"attempts": []}')
    first = publish(store, artifact, DESCRIPTION, {"report.json": report})
    listed = store.list()
    report.write_text('{"attempts": ["resumed after a kill that came right after the publication"]}')
    assert publish(store, artifact, DESCRIPTION, {"report.json": report}) == first
    assert store.list() == listed


def test_another_content_gets_another_directory_and_the_pointer(store: ObjectStore, artifact: Path) -> None:
    first = publish(store, artifact, DESCRIPTION)
    second = publish(store, artifact, replace(DESCRIPTION, metrics={"validationLoss": 1.25}))
    (artifact / "adapter_model.safetensors").write_bytes(b"better!" * 1000)
    third = publish(store, artifact, DESCRIPTION)
    assert len({first.uri, second.uri, third.uri}) == 3
    assert find_artifact(store)[0].uri == third.uri
    for published in (first, second):
        place, manifest, _ = find_artifact(store.at(published.uri))
        verify_bundle(place, "", manifest)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "manifest"])
def test_damage_is_noticed_and_mended_by_publishing_again(
    store: ObjectStore, artifact: Path, tmp_path: Path, fault: str
) -> None:
    place = store.at(publish(store, artifact, DESCRIPTION).uri)
    name = "manifest.json" if fault == "manifest" else "adapter_model.safetensors"
    content = place.get(name)
    if fault == "missing":
        place.delete(name)
    else:
        place.put(name, content[:-1] if fault != "flipped" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedBundle, match="manifest.json" if fault == "manifest" else "adapter_model.safetensors"):
        fetch_artifact(store, tmp_path / "copy")
    publish(store, artifact, DESCRIPTION)
    fetch_artifact(store, tmp_path / "copy")


def test_an_unfinished_publication_is_invisible_and_removed_when_nobody_can_be_writing_it(
    store: ObjectStore, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("artifacts/0123456789ab/adapter_model.safetensors", b"half")
    published = publish(store, artifact, DESCRIPTION)
    assert fetch_artifact(store, tmp_path / "copy").seed == DESCRIPTION.seed

    def left() -> set[str]:
        return {info.path.split("/")[1] for info in store.list("artifacts")}

    assert left() == {published.uri.split("/")[-2], "0123456789ab"}
    monkeypatch.setattr("finetune_trainer.publish._ABANDONED_AFTER", timedelta(seconds=-10))  # S3 rounds its times
    assert publish(store, artifact, DESCRIPTION) == published
    assert left() == {published.uri.split("/")[-2]}


def test_what_a_kill_left_in_a_local_directory_is_removed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore.open(f"file://{tmp_path}/out")
    directory = store.at(publish(store, artifact, DESCRIPTION).uri).local_directory
    assert directory is not None
    (directory / "manifest.json").unlink()
    (directory / "adapter_model.safetensors#1").write_bytes(b"half a file that was being written")
    monkeypatch.setattr("finetune_trainer.publish._ABANDONED_AFTER", timedelta(0))
    second = publish(store, artifact, DESCRIPTION)
    assert [path.name for path in directory.parent.iterdir()] == [second.uri.split("/")[-2]]


class Killed(BaseException):
    """The launcher is gone, right after a write."""


@pytest.mark.parametrize("other", [DESCRIPTION, replace(DESCRIPTION, plan={"worldSize": 1})], ids=["same", "differs"])
@pytest.mark.parametrize("ending", ["killed", "goes on"])
def test_two_launchers_that_publish_at_once_leave_each_others_artifact_whole(
    store: ObjectStore,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: ArtifactDescription,
    ending: str,
) -> None:
    """The older one is stopped after each of its writes, and its replacement publishes meanwhile."""
    reports = [tmp_path / "older.json", tmp_path / "newer.json"]
    for report in reports:
        report.write_text(f'{{"seconds": "{report.stem}"}}')  # what it took is never the same
    real, writes, meanwhile = ObjectStore.put, 0, 1
    newer: list[tuple[ObjectStore, str]] = []

    def put(self: ObjectStore, path: str, content: bytes | Path) -> None:
        nonlocal writes
        real(self, path, content)
        writes += 1
        if writes == meanwhile:
            published = publish(place, artifact, other, {"report.json": reports[1]})
            newer.append((place.at(published.uri), published.manifest_sha256))
            if ending == "killed":
                raise Killed
        for where, sha256 in newer:
            find_whole(where, sha256)

    def find_whole(where: ObjectStore, sha256: str) -> None:
        found, manifest, told = find_artifact(where)
        verify_bundle(found, "", manifest)
        assert told == sha256

    monkeypatch.setattr(ObjectStore, "put", put)
    for meanwhile in range(1, 6):  # three files, the manifest, the pointer
        writes, place = 0, store.child(f"after-{meanwhile}")
        newer.clear()
        if ending == "killed":
            with pytest.raises(Killed):
                publish(place, artifact, DESCRIPTION, {"report.json": reports[0]})
        else:
            older = publish(place, artifact, DESCRIPTION, {"report.json": reports[0]})
            find_whole(place.at(older.uri), older.manifest_sha256)
            if other == DESCRIPTION:  # then one artifact is everybody's
                assert newer[0] == (place.at(older.uri), older.manifest_sha256)
                find_whole(place, older.manifest_sha256)
        assert len(newer) == 1
        find_whole(*newer[0])
        fetch_artifact(place, tmp_path / f"copy-{meanwhile}")


def test_a_directory_that_loses_a_file_before_it_is_pointed_at_is_written_again(
    store: ObjectStore, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, losses = ObjectStore.put, 1

    def put(self: ObjectStore, path: str, content: bytes | Path) -> None:
        nonlocal losses
        real(self, path, content)
        if path == "manifest.json" and losses:
            losses -= 1
            self.delete("adapter_config.json")  # by the clean-up of an earlier version's launcher

    monkeypatch.setattr(ObjectStore, "put", put)
    published = publish(store, artifact, DESCRIPTION)
    fetch_artifact(store, tmp_path / "copy", manifest_sha256=published.manifest_sha256)
    losses = 2
    with pytest.raises(StorageError, match=r"artifacts/[0-9a-f]{12}/ is not what was written there, 2 times; see who"):
        publish(store, artifact, replace(DESCRIPTION, seed=43))
    assert fetch_artifact(store, tmp_path / "other").seed == DESCRIPTION.seed


def test_nothing_to_publish_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError) as caught:
        publish(store, tmp_path / "empty", DESCRIPTION)
    assert str(caught.value) == f"'{tmp_path}/empty' holds no file to publish; the trainer wrote nothing there."


_PUBLISHER = """
import dataclasses, json, pathlib, sys
from finetune_storage import ObjectStore
from finetune_trainer.publish import publish
from tests.unit.trainer.test_publish import DESCRIPTION
store, directory, version = ObjectStore.open(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
while True:
    version += 1
    for part in range(3):
        (directory / f"part-{part}").write_bytes(version.to_bytes(4, "big") * 250_000)
    publish(store, directory, dataclasses.replace(DESCRIPTION, seed=version))
    print(version, flush=True)
"""


def _whole_version(store: ObjectStore, destination: Path) -> int:
    """Fetch (which verifies every digest) and check that all parts are of one version."""
    manifest = fetch_artifact(store, destination)
    for part in range(3):
        assert (destination / f"part-{part}").read_bytes() == manifest.seed.to_bytes(4, "big") * 250_000
    return manifest.seed


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_artifact(
    store: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server: Any = request.getfixturevalue("s3_server") if store.uri.startswith("s3") else None
    environment = {**os.environ, **(server.environment if server else {}), "PYTHONPATH": os.getcwd()}
    dice, version = random.Random(0), 0
    for turn in range(6):
        directory = tmp_path / f"turn-{turn}"
        directory.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", _PUBLISHER, store.uri, str(directory), str(version)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        if turn == 0:
            assert child.stdout.readline() == "1\n"  # from now on there is an old artifact
        time.sleep(dice.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        reported = [int(line) for line in child.stdout.read().split()]
        assert child.wait() == -signal.SIGKILL
        found = _whole_version(store, tmp_path / f"copy-{turn}")
        latest = max([version, *reported, 1 if turn == 0 else version])
        assert latest <= found <= latest + 1
        version = found


def test_the_manifest_is_json_for_other_tools(store: ObjectStore, artifact: Path) -> None:
    published = publish(store, artifact, DESCRIPTION)
    content = json.loads(store.at(published.uri).get("manifest.json"))
    assert content["baseModel"] == {"uri": "hf://org/base", "revision": "0" * 40, "configSha256": "1" * 64}
    assert content["files"][0]["path"] == "adapter_config.json"
    assert content["createdAt"].endswith("+00:00")
