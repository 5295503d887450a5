from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from finetune_api.report import ArtifactManifest, FileEntry
from finetune_storage import (
    DamagedBundle,
    ObjectNotFound,
    ObjectStore,
    StorageError,
    StorageUnavailable,
    commit,
    delete_bundle,
    fetch_artifact,
    fetch_bundle,
    find_artifact,
    list_bundles,
    read_manifest,
    verify_bundle,
    write_file,
)
from finetune_storage.artifact import check_destination, write_pointer


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open(f"file://{tmp_path}/bucket")


def _manifest(files: tuple[FileEntry, ...]) -> ArtifactManifest:
    return ArtifactManifest(
        job={},
        format="Adapter",
        base_model={},
        dataset={},
        seed=1,
        versions={},
        config={},
        plan={},
        metrics={},
        files=files,
        created_at="2026-01-01T00:00:00+00:00",
    )


def _bundle(store: ObjectStore, name: str) -> str:
    place = store.child(name)
    files = tuple(write_file(place, path, path.encode() * 100) for path in ("a.bin", "deep/b.bin", "c.bin"))
    return commit(store, name, _manifest(files))


def test_a_bundle_exists_when_its_manifest_does(store: ObjectStore, tmp_path: Path) -> None:
    write_file(store.child("one"), "a.bin", b"1")
    assert list_bundles(store) == []
    with pytest.raises(ObjectNotFound):
        fetch_bundle(store, "one", ArtifactManifest, tmp_path / "copy")
    sha256 = _bundle(store, "two")
    assert list_bundles(store) == ["two"]
    assert sha256 == hashlib.sha256(store.get("two/manifest.json")).hexdigest()
    manifest = fetch_bundle(store, "two", ArtifactManifest, tmp_path / "copy")
    assert (manifest, sha256) == read_manifest(store, "two", ArtifactManifest)
    assert (tmp_path / "copy" / "deep" / "b.bin").read_bytes() == b"deep/b.bin" * 100


def test_every_fault_of_a_bundle_is_listed(store: ObjectStore, tmp_path: Path) -> None:
    _bundle(store, "x")
    directory = store.local_directory
    assert directory is not None
    (directory / "x/a.bin").write_bytes(b"short")
    flipped = bytearray((directory / "x/c.bin").read_bytes())
    flipped[7] ^= 1
    (directory / "x/c.bin").write_bytes(bytes(flipped))
    (directory / "x/deep/b.bin").unlink()
    found = hashlib.sha256(bytes(flipped)).hexdigest()[:12]
    expected = hashlib.sha256(b"c.bin" * 100).hexdigest()[:12]
    problems = (
        "'a.bin' has 5 bytes instead of 500.",
        "'deep/b.bin' is missing.",
        f"'c.bin' has sha256 {found}… instead of {expected}….",
    )
    with pytest.raises(DamagedBundle) as caught:
        fetch_bundle(store, "x", ArtifactManifest, tmp_path / "copy")
    assert caught.value.problems == problems
    assert str(caught.value) == f"{store.uri}x/ is damaged: {' '.join(problems)}"
    assert not (tmp_path / "copy").exists()
    with pytest.raises(DamagedBundle) as verified:
        verify_bundle(store, "x", read_manifest(store, "x", ArtifactManifest)[0])
    assert verified.value.problems == problems


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}'])
def test_an_unreadable_manifest_is_damage(store: ObjectStore, content: bytes) -> None:
    store.put("x/manifest.json", content)
    with pytest.raises(DamagedBundle, match=r"manifest.json is not readable"):
        read_manifest(store, "x", ArtifactManifest)


@pytest.mark.parametrize("path", ["../escape", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_write_outside_its_directory(store: ObjectStore, tmp_path: Path, path: str) -> None:
    entry = FileEntry(path=path, sha256="0" * 64, bytes=1)
    commit(store, "x", _manifest((entry,)))
    with pytest.raises(DamagedBundle) as caught:
        fetch_bundle(store, "x", ArtifactManifest, tmp_path / "copy")
    assert caught.value.problems == (f"'{path}' is not a path inside the bundle.",)


def test_a_failed_fetch_keeps_what_was_there(store: ObjectStore, tmp_path: Path) -> None:
    _bundle(store, "x")
    fetch_bundle(store, "x", ArtifactManifest, tmp_path / "copy")
    store.put("x/a.bin", b"damaged")
    with pytest.raises(DamagedBundle):
        fetch_bundle(store, "x", ArtifactManifest, tmp_path / "copy")
    assert (tmp_path / "copy" / "a.bin").read_bytes() == b"a.bin" * 100


def test_deleting_a_bundle_leaves_nothing(store: ObjectStore) -> None:
    _bundle(store, "x")
    delete_bundle(store, "x")
    assert store.list() == []


def test_an_artifact_is_found_by_its_own_uri_and_by_the_jobs_prefix(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = _bundle(store, "artifacts/abc")
    write_pointer(store, "artifacts/abc", sha256)
    for place in (store, store.child("artifacts/abc")):
        found, _, digest = find_artifact(place)
        assert (found.uri, digest) == (f"{store.uri}artifacts/abc/", sha256)
    fetch_artifact(store, tmp_path / "copy", manifest_sha256=sha256)
    assert (tmp_path / "copy" / "a.bin").exists()


def test_another_manifest_than_the_reported_one_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = _bundle(store, "artifacts/abc")
    with pytest.raises(DamagedBundle) as caught:
        fetch_artifact(store.child("artifacts/abc"), tmp_path / "copy", manifest_sha256="0" * 64)
    assert caught.value.problems == (f"manifest.json has sha256 {sha256[:12]}… instead of 000000000000….",)
    write_pointer(store, "artifacts/abc", "0" * 64)
    with pytest.raises(DamagedBundle) as caught:
        fetch_artifact(store, tmp_path / "copy")
    assert caught.value.problems == ("manifest.json is not the one that latest.json names.",)


def test_an_artifact_that_is_not_there_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound) as caught:
        fetch_artifact(store, tmp_path / "copy")
    assert str(caught.value) == f"No artifact is published at {store.uri}; give the URI that the job reported."


def test_a_full_destination_is_not_overwritten(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"1")
    with pytest.raises(StorageError) as caught:
        fetch_artifact(store, tmp_path)
    assert str(caught.value) == f"'{tmp_path}' is not empty; choose another directory for the artifact."


def test_the_manifest_is_fetched_byte_by_byte(store: ObjectStore, tmp_path: Path) -> None:
    """Another version may have written it with other spaces; its digest is what the job has reported."""
    _bundle(store, "x")
    store.put("x/manifest.json", store.get("x/manifest.json").rstrip())
    fetch_bundle(store, "x", ArtifactManifest, tmp_path / "copy")
    assert (tmp_path / "copy" / "manifest.json").read_bytes() == store.get("x/manifest.json")


def test_an_artifact_that_was_fetched_before_is_verified_and_not_fetched_again(
    store: ObjectStore, tmp_path: Path
) -> None:
    sha256 = _bundle(store, "artifacts/abc")
    write_pointer(store, "artifacts/abc", sha256)
    copy = tmp_path / "copy"
    first = fetch_artifact(store, copy, manifest_sha256=sha256)
    before = (copy / "a.bin").stat().st_ino
    assert fetch_artifact(store, copy) == first
    delete_bundle(store, "artifacts/abc")
    assert fetch_artifact(store, copy, manifest_sha256=sha256) == first
    assert (copy / "a.bin").stat().st_ino == before
    with pytest.raises(StorageError) as another:
        fetch_artifact(store, copy, manifest_sha256="0" * 64)
    assert str(another.value) == f"'{copy}' is not empty; choose another directory for the artifact."
    (copy / "a.bin").write_bytes(b"short")
    (copy / "deep" / "b.bin").unlink()
    with pytest.raises(StorageError) as changed:
        fetch_artifact(store, copy, manifest_sha256=sha256)
    assert str(changed.value) == (
        f"'{copy}' holds this artifact, changed since it was fetched: 'a.bin' has 5 bytes instead of 500."
        " 'deep/b.bin' is missing. Remove it, or choose another directory for the artifact."
    )


def test_an_empty_folder_stays_the_folder_that_it_is(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be the current one, a link or a mount point: none of them can be replaced."""
    _bundle(store, "x")
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    monkeypatch.chdir(here)
    for destination in (Path(), link):
        before = destination.stat().st_ino
        (destination / ".finetune.partial").mkdir()  # of a fetch that was killed
        fetch_artifact(store.child("x"), destination)
        assert destination.stat().st_ino == before
        assert sorted(path.name for path in destination.iterdir()) == ["a.bin", "c.bin", "deep", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket", "here", "link", "linked"]


def test_a_fetch_that_failed_leaves_an_empty_folder_empty(store: ObjectStore, tmp_path: Path) -> None:
    _bundle(store, "x")
    store.put("x/a.bin", b"damaged")
    (tmp_path / "copy").mkdir()
    with pytest.raises(DamagedBundle):
        fetch_artifact(store.child("x"), tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


def test_a_destination_that_cannot_be_written_is_told_before_the_download(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    told = []
    for destination in (Path("/proc/nope/copy"), tmp_path / "file", tmp_path / "file" / "copy", tmp_path / "nowhere"):
        with pytest.raises(StorageError) as caught:
            fetch_artifact(store, destination)  # which is empty: it was not asked
        told.append(str(caught.value).replace(str(tmp_path), ""))
    assert told == [
        "'/proc/nope/copy' cannot be written (No such file or directory); choose another directory for the artifact.",
        "'/file' is not a directory; choose another directory for the artifact.",
        "'/file/copy' cannot be written (Not a directory); choose another directory for the artifact.",
        "'/nowhere' is not a directory; choose another directory for the artifact.",
    ]


def test_trying_a_destination_out_leaves_nothing(tmp_path: Path) -> None:
    assert not check_destination(tmp_path / "deep" / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_told_in_a_sentence(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bundle(store, "x")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ObjectStore, "download", full)
    with pytest.raises(StorageError) as caught:
        fetch_artifact(store.child("x"), tmp_path / "copy")
    assert str(caught.value) == (
        f"'{tmp_path}/copy' cannot be written (No space left on device); choose another directory for the artifact."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket"]


def test_an_outage_during_a_fetch_is_no_trouble_of_the_disk(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bundle(store, "x")

    def away(*_: object) -> None:
        raise StorageUnavailable("Could not read s3://bucket/x/a.bin: nobody answers.")

    monkeypatch.setattr(ObjectStore, "download", away)
    with pytest.raises(StorageUnavailable) as caught:
        fetch_artifact(store.child("x"), tmp_path / "copy")
    assert str(caught.value) == "Could not read s3://bucket/x/a.bin: nobody answers."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bucket"]
