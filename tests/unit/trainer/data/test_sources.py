"""Where data comes from: globs, a real S3 server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.builders import conversations, write_jsonl
from tests.unit.trainer.data.rig import Workbench

from finetune_api.errors import DataError, StorageError
from finetune_storage import ObjectStore
from finetune_trainer.data.sources import matches


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.jsonl", "*.jsonl", True),
        ("b/a.jsonl", "*.jsonl", False),
        ("b/a.jsonl", "*/*.jsonl", True),
        ("a.jsonl", "**/*.jsonl", True),
        ("b/c/a.jsonl", "**/*.jsonl", True),
        ("b/c/a.jsonl", "b/**", True),
        ("b/c/a.jsonl", "b/**/c/*", True),
        ("x/c/a.jsonl", "b/**", False),
        ("part-07.jsonl", "part-0[0-6].jsonl", False),
        ("part-07.jsonl", "part-??.jsonl", True),
        ("A.jsonl", "a.jsonl", False),
    ],
)
def test_stars_stay_in_a_segment_and_double_stars_span_segments(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


@pytest.fixture
def uploaded(s3_server: Any, bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """20 rows in three files of a real bucket; the source that names the endpoint."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    rows = conversations(20)
    write_jsonl(bench.path("all.jsonl"), rows)
    store = ObjectStore.open(f"s3://bucket/{bench.home.name}", endpoint=s3_server.endpoint)
    for i, name in enumerate(["a.jsonl", "b.jsonl.zst", "deep/c.jsonl.gz"]):
        store.put(name, write_jsonl(bench.path(f"parts/{name}"), rows[i::3]))
    store.put("README.md", b"not data")
    return {"uri": f"s3://bucket/{bench.home.name}", "endpoint": s3_server.endpoint}


def files(bench: Workbench, source: dict[str, Any], pattern: str) -> list[str]:
    data = bench.prepare([{**source, "uri": source["uri"] + pattern}])
    return [file["name"] for file in data.counts["sources"][0]["files"]]


@pytest.mark.s3
def test_objects_are_listed_matched_and_read(bench: Workbench, uploaded: dict[str, Any]) -> None:
    assert files(bench, uploaded, "/*") == ["a.jsonl", "b.jsonl.zst"]
    assert files(bench, uploaded, "/**/*.jsonl.gz") == ["deep/c.jsonl.gz"]
    assert files(bench, uploaded, "/a.jsonl") == ["a.jsonl"]
    assert files(bench, uploaded, "/deep") == ["c.jsonl.gz"]
    assert files(bench, uploaded, "") == ["a.jsonl", "b.jsonl.zst", "deep/c.jsonl.gz"]
    data = bench.prepare([uploaded])
    assert data.counts["rowsRead"] == 20
    assert data.train.origin(19) == "deep/c.jsonl.gz:6"


@pytest.mark.s3
def test_objects_are_downloaded_once(bench: Workbench, uploaded: dict[str, Any]) -> None:
    bench.prepare([uploaded])
    cached = sorted((bench.home / "cache" / "sources").rglob("*.*"))
    before = [path.stat().st_mtime_ns for path in cached]
    assert [path.name for path in cached if path.is_file()] != []
    bench.prepare([uploaded], lossOn="All")
    assert [path.stat().st_mtime_ns for path in cached] == before


@pytest.mark.s3
def test_an_object_that_changed_is_read_anew(bench: Workbench, uploaded: dict[str, Any]) -> None:
    source = {**uploaded, "uri": uploaded["uri"] + "/a.jsonl"}
    before = bench.prepare([source])
    store = ObjectStore.open(uploaded["uri"], endpoint=uploaded["endpoint"])
    store.put("a.jsonl", write_jsonl(bench.path("new.jsonl"), conversations(3, seed=5)))
    after = bench.prepare([source])
    assert (len(before.train), len(after.train)) == (7, 3)
    assert before.facts.digest != after.facts.digest


@pytest.mark.s3
def test_no_object_under_a_prefix_is_one_sentence(bench: Workbench, uploaded: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        bench.prepare([{**uploaded, "uri": "s3://bucket/nothing/here"}])
    assert str(caught.value) == (
        "spec.dataset.train[0].uri: s3://bucket/nothing/here matches no file; correct the path or the pattern"
    )


@pytest.mark.s3
def test_wrong_credentials_are_a_storage_error(
    bench: Workbench, uploaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError):
        bench.prepare([uploaded])


def test_a_scheme_that_cannot_be_read_is_one_sentence(bench: Workbench) -> None:
    with pytest.raises(StorageError) as caught:
        bench.prepare([{"uri": "pvc://claim/data.jsonl"}])
    assert str(caught.value) == (
        "A pvc:// URI names a volume of the cluster; use file://, s3://, gs:// or az:// outside of one."
    )


def test_names_with_spaces_and_other_letters(bench: Workbench) -> None:
    path = write_jsonl(bench.path("größe 1.jsonl"), conversations(2))
    data = bench.prepare([{"uri": f"file://{path}".replace(" ", "%20")}])
    assert data.train.origin(0) == "größe 1.jsonl:1"
    assert isinstance(data.directory, Path)
