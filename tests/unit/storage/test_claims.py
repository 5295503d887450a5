"""``pvc://claim/path`` is a directory where the claim is mounted, and keeps its name everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_storage import ObjectStore, StorageError, parse_uri, split_uri


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory under which claims are mounted; ``data`` is."""
    root = tmp_path / "claims"
    (root / "data").mkdir(parents=True)
    monkeypatch.setenv("FINETUNE_CLAIMS_DIRECTORY", str(root))
    return root


def test_a_store_on_a_claim_reads_and_writes_its_mount(claims: Path) -> None:
    store = ObjectStore.open("pvc://data/adapters/team")
    store.put("a/file", b"content")
    assert (claims / "data" / "adapters" / "team" / "a" / "file").read_bytes() == b"content"
    assert store.uri == "pvc://data/adapters/team/"
    assert store.join("a/file") == "pvc://data/adapters/team/a/file"
    assert [info.path for info in store.list()] == ["a/file"]
    assert store.local_directory == claims / "data" / "adapters" / "team"


def test_deleting_the_last_object_of_a_directory_leaves_no_empty_directory(claims: Path) -> None:
    store = ObjectStore.open("pvc://data/adapters")
    store.put("deep/er/file", b"")
    store.delete("deep/er/file")
    assert [path.name for path in (claims / "data").rglob("*")] == ["adapters"]


def test_an_absent_object_is_named_by_its_uri(claims: Path) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("pvc://data/").get("config.json")
    assert str(caught.value) == "Could not read pvc://data/config.json: it does not exist."


def test_a_space_in_a_path_is_written_as_in_a_file_uri(claims: Path) -> None:
    ObjectStore.open("pvc://data/two%20words").put("x", b"1")
    assert (claims / "data" / "two words" / "x").read_bytes() == b"1"
    assert parse_uri("pvc://data/two%20words/x").uri == "pvc://data/two%20words/x"


def test_a_glob_has_the_claim_as_its_parent(claims: Path) -> None:
    assert split_uri("pvc://data/*.jsonl") == ("pvc://data/", "*.jsonl")
    assert split_uri("pvc://data/a/*/b.jsonl") == ("pvc://data/a/", "*/b.jsonl")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "pvc://other/x",
            "The PersistentVolumeClaim 'other' is not mounted here; correct pvc://other/x, "
            "or mount the claim at {root}/other.",
        ),
        ("pvc://data/../x", "'pvc://data/../x' contains '.' or '..'; write the path out."),
        ("pvc://data/%2e%2e/x", "'pvc://data/%2e%2e/x' contains '.' or '..'; write the path out."),
        ("pvc://../x", "'..' in 'pvc://../x' is no name of a PersistentVolumeClaim; write pvc://CLAIM/PATH."),
        ("pvc://Data/x", "'Data' in 'pvc://Data/x' is no name of a PersistentVolumeClaim; write pvc://CLAIM/PATH."),
        ("pvc:///x", "'pvc:///x' names no claim; write pvc://CLAIM/PATH."),
    ],
)
def test_a_claim_that_cannot_be_used_is_refused(claims: Path, uri: str, message: str) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open(uri)
    assert str(caught.value) == message.format(root=claims)


def test_outside_of_a_cluster_a_claim_means_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CLAIMS_DIRECTORY", str(tmp_path / "absent"))
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("pvc://data/x")
    assert str(caught.value) == (
        "A pvc:// URI names a volume of the cluster; use file://, s3://, gs:// or az:// outside of one."
    )
