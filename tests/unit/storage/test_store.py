"""The same contract on a directory and on a real S3 server."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_storage import ObjectNotFound, ObjectStore, StorageError
from finetune_storage.store import ConditionalWriteUnsupported


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "file":
        yield ObjectStore.open(f"file://{tmp_path}/out")
    else:
        server: Any = request.getfixturevalue("s3_server")
        yield ObjectStore.open(f"s3://bucket/{tmp_path.name}/out", environment=server.environment, retry_seconds=5)


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(20_000_000)], ids=["empty", "small", "parts"])
def test_what_is_put_is_what_is_got(store: ObjectStore, tmp_path: Path, content: bytes) -> None:
    local = tmp_path / "local"
    local.write_bytes(content)
    store.put("a/file", local)
    assert store.get("a/file") == content
    assert store.digest("a/file") == (hashlib.sha256(content).hexdigest(), len(content))
    assert store.head("a/file").bytes == len(content)
    store.download("a/file", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == content
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["copy"]


def test_a_range_is_cut_at_the_end(store: ObjectStore) -> None:
    store.put("x", b"0123456789")
    assert store.get_range("x", 2, 5) == b"234"
    assert store.get_range("x", 8, 50) == b"89"
    assert store.get_range("x", 3, 3) == b""


def test_a_listing_is_relative_sorted_and_by_whole_segments(store: ObjectStore) -> None:
    for path in ("step-2/b", "step-2/a c", "step-20/a", "x"):
        store.put(path, b"1")
    assert [info.path for info in store.list()] == ["step-2/a c", "step-2/b", "step-20/a", "x"]
    assert [info.path for info in store.list("step-2")] == ["step-2/a c", "step-2/b"]
    assert [info.path for info in store.child("step-2").list()] == ["a c", "b"]
    assert store.list("absent") == []


def test_putting_again_replaces(store: ObjectStore) -> None:
    store.put("x", b"old")
    store.put("x", b"newer")
    assert store.get("x") == b"newer"


def test_of_many_that_create_one_object_one_succeeds(store: ObjectStore) -> None:
    for number in range(10):
        start = threading.Barrier(8)

        def create(who: int, path: str = f"deep/{number}", start: threading.Barrier = start) -> bool:
            start.wait()
            return store.create(path, b"%d" % who * 1000)

        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(create, range(8)))
        assert store.get(f"deep/{number}") == b"%d" % told.index(True) * 1000
        assert told.count(True) == 1
    assert not store.create("deep/0", b"again")
    assert [info.path for info in store.list()] == [f"deep/{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(501, "NotImplemented", "does not know If-None-Match"), (200, "", "takes no notice of If-None-Match")],
)
def test_a_store_that_cannot_create_without_overwriting_says_so(status: int, code: str, reason: str) -> None:
    class Old(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
            self.send_response(status)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    endpoint = f"http://127.0.0.1:{server.server_port}"
    store = ObjectStore.open("s3://bucket/x", endpoint=endpoint, environment=environment, retry_seconds=1)
    with pytest.raises(ConditionalWriteUnsupported) as caught:
        store.create("a", b"1")
    server.shutdown()
    assert str(caught.value) == f"Could not create s3://bucket/x/a: its store {reason}; use another one."


def test_deleting_is_idempotent_and_leaves_no_trace(store: ObjectStore) -> None:
    store.put("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert not store.exists("a/b/c")
    assert store.list() == []
    if store.local_directory:
        assert list(store.local_directory.iterdir()) == []


def test_an_absent_object_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound) as caught:
        store.get("no/such")
    assert str(caught.value) == f"Could not read {store.uri}no/such: it does not exist."
    with pytest.raises(ObjectNotFound) as caught:
        store.download("no/such", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a//b", "a/../b", "a/"])
def test_a_path_that_leaves_the_prefix_is_refused(store: ObjectStore, path: str) -> None:
    with pytest.raises(StorageError) as caught:
        store.put(path, b"1")
    assert str(caught.value) == (
        f"'{path}' is no object path under {store.uri}; use names separated by single slashes."
    )


def test_an_absent_local_file_is_named(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        store.put("x", tmp_path / "absent")
    assert str(caught.value) == (
        f"Local file '{tmp_path}/absent' cannot be uploaded: No such file or directory; check that it exists."
    )


def test_reading_writes_no_directory(tmp_path: Path) -> None:
    store = ObjectStore.open(f"file://{tmp_path}/absent")
    assert store.list() == []
    assert not store.exists("x")
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_the_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(StorageError) as caught:
        ObjectStore.open(f"file://{tmp_path}/file").put("x", b"1")
    assert str(caught.value).startswith(f"Could not write file://{tmp_path}/file/x: ")
