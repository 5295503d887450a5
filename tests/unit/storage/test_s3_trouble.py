"""A real S3 server with wrong credentials, without the bucket, cut off in mid-transfer, stopped and started again."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.s3 import CuttingProxy

from finetune_storage import ObjectStore, StorageError, StorageUnavailable

pytestmark = pytest.mark.s3

_HELP = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where one is used)."


def _texts(error: BaseException) -> str:
    """Everything a log or traceback could show of an error and its causes."""
    seen, shown = error, []
    while seen is not None:
        shown += [str(seen), repr(seen), repr(getattr(seen, "hint", ""))]
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\n".join(shown)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "a-wrong-but-secret-key"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "AKIANOBODY"}, "XAdminUserNotFound"),
    ],
)
@pytest.mark.parametrize("operation", ["put", "get", "list", "digest"])
def test_wrong_credentials_are_refused_at_once_and_stay_secret(
    s3_server: Any, changes: dict[str, str], code: str, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {**s3_server.environment, **changes}
    store = ObjectStore.open("s3://bucket/x", environment=environment)
    call = {
        "put": lambda: store.put("a", b"1"),
        "get": lambda: store.get("a"),
        "list": lambda: store.list(),
        "digest": lambda: store.digest("a"),
    }[operation]
    verb, place = {"put": ("write", "a"), "list": ("list", "")}.get(operation, ("read", "a"))
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageError) as caught:
        call()
    assert time.monotonic() - started < 60
    assert str(caught.value) == (
        f"Could not {verb} s3://bucket/x/{place}: the credentials were not accepted ({code}) "
        f"at {s3_server.endpoint}; {_HELP}"
    )
    for secret in (environment["AWS_SECRET_ACCESS_KEY"], environment["AWS_ACCESS_KEY_ID"]):
        assert secret not in _texts(caught.value) + caplog.text + repr(store) + str(store)


def test_absent_credentials_name_the_variables(s3_server: Any) -> None:
    environment = {**s3_server.environment, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("s3://bucket/x", environment=environment)
    assert str(caught.value) == (
        f"No credentials for s3://bucket at {s3_server.endpoint}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
        "(or AWS_SKIP_SIGNATURE=true for a public bucket)."
    )


@pytest.mark.parametrize(
    ("operation", "verb"), [("put", "write"), ("get", "read"), ("head", "look up"), ("exists", "look up")]
)
def test_an_absent_bucket_is_named(s3_server: Any, operation: str, verb: str) -> None:
    store = ObjectStore.open("s3://nowhere/x", environment=s3_server.environment)
    with pytest.raises(StorageError) as caught:
        store.put("a", b"1") if operation == "put" else getattr(store, operation)("a")
    assert str(caught.value) == (
        f"Could not {verb} s3://nowhere/x/a: bucket 'nowhere' does not exist (NoSuchBucket) "
        f"at {s3_server.endpoint}; create it, or correct the bucket in the URI or the endpoint."
    )


def test_a_wrong_region_names_the_variable(s3_server: Any) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("s3://bucket/x", region="eu-west-1", environment=s3_server.environment).put("a", b"1")
    assert str(caught.value) == (
        "Could not write s3://bucket/x/a: bucket 'bucket' is in another region (AuthorizationHeaderMalformed) "
        f"at {s3_server.endpoint}; set AWS_REGION or the region field."
    )


@pytest.mark.parametrize("cuts", [1, 6])
def test_a_connection_cut_in_mid_upload_is_survived(s3_server: Any, tmp_path: Path, cuts: int) -> None:
    content = os.urandom(20_000_000)
    (tmp_path / "file").write_bytes(content)
    with CuttingProxy(s3_server.port, after_bytes=3_000_000, cuts=cuts) as proxy:
        store = ObjectStore.open(
            f"s3://bucket/{tmp_path.name}", endpoint=proxy.endpoint, environment=s3_server.environment
        )
        store.put("file", tmp_path / "file")
        assert proxy.cut == cuts
    direct = ObjectStore.open(f"s3://bucket/{tmp_path.name}", environment=s3_server.environment)
    assert direct.digest("file") == (hashlib.sha256(content).hexdigest(), len(content))


def test_an_upload_that_is_always_cut_leaves_the_old_object(s3_server: Any, tmp_path: Path) -> None:
    direct = ObjectStore.open(f"s3://bucket/{tmp_path.name}", environment=s3_server.environment)
    direct.put("file", b"old")
    (tmp_path / "file").write_bytes(os.urandom(20_000_000))
    with CuttingProxy(s3_server.port, after_bytes=3_000_000, cuts=1000) as proxy:
        store = ObjectStore.open(
            f"s3://bucket/{tmp_path.name}", endpoint=proxy.endpoint, environment=s3_server.environment, retry_seconds=0
        )
        with pytest.raises(StorageUnavailable) as caught:
            store.put("file", tmp_path / "file")
    assert str(caught.value).startswith(f"Could not write s3://bucket/{tmp_path.name}/file: connection ")
    assert direct.get("file") == b"old"


def test_a_download_that_is_cut_goes_on_where_it_was_cut(s3_server: Any, tmp_path: Path) -> None:
    content = os.urandom(20_000_000)
    direct = ObjectStore.open(f"s3://bucket/{tmp_path.name}", environment=s3_server.environment)
    direct.put("file", content)
    with CuttingProxy(s3_server.port, after_bytes=7_000_000, cuts=2, direction="down") as proxy:
        store = ObjectStore.open(
            f"s3://bucket/{tmp_path.name}", endpoint=proxy.endpoint, environment=s3_server.environment
        )
        store.download("file", tmp_path / "copy")
        assert proxy.cut == 2
    assert (tmp_path / "copy").read_bytes() == content


def test_a_server_that_is_stopped_and_started_again_is_survived(own_s3_server: Any) -> None:
    store = ObjectStore.open("s3://bucket/x", environment=own_s3_server.environment, retry_seconds=60)
    store.put("before", b"1")
    own_s3_server.stop()
    started = time.monotonic()
    again = threading.Timer(4.0, own_s3_server.start)
    again.start()
    store.put("during", b"2")
    assert time.monotonic() - started >= 3.5
    again.join()
    assert [info.path for info in store.list()] == ["before", "during"]


def test_a_server_that_stays_away_ends_the_budget(own_s3_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = ObjectStore.open("s3://bucket/x", environment=own_s3_server.environment, retry_seconds=1)
    own_s3_server.stop()
    started = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        store.put("a", b"1")
    assert 1.0 <= time.monotonic() - started < 60.0
    head, _, tail = str(caught.value).partition(", tried ")
    assert head == f"Could not write s3://bucket/x/a: connection refused at {own_s3_server.endpoint}"
    assert tail.endswith(" s; check the endpoint and that the server runs.")
    assert (
        f"could not write s3://bucket/x/a: connection refused at {own_s3_server.endpoint}; trying again" in caplog.text
    )


def test_the_server_keeps_its_secret_out_of_arguments_and_text(own_s3_server: Any) -> None:
    arguments = Path(f"/proc/{own_s3_server.process.pid}/cmdline").read_bytes()
    assert own_s3_server.secret_key.encode() not in arguments
    assert own_s3_server.secret_key not in repr(own_s3_server)
