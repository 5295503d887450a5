"""Two Secrets with the same keys: every location is opened with its own."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.spec import DataSource, Output
from finetune_storage import ObjectStore, StorageError

OUTPUT = {"uri": "s3://bucket/apart", "credentials": {"secretName": "own"}}


@pytest.mark.s3
def test_a_location_without_a_secret_reads_the_plain_names(s3_server: Any) -> None:
    location = Output.model_validate({"uri": "s3://bucket/apart"})
    environment = _prefixed("other", {"AWS_ACCESS_KEY_ID": "wrong"}) | s3_server.environment
    store = ObjectStore.open_location(location, environment=environment, retry_seconds=5)
    store.put("plain", b"1")
    assert store.get("plain") == b"1"


@pytest.mark.s3
def test_a_secret_of_its_own_wins_over_the_plain_names_of_another(s3_server: Any) -> None:
    other = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "of-another-store", "AWS_SESSION_TOKEN": "another"}
    environment = {**other, **_prefixed("other", other), **_prefixed("own", s3_server.environment)}
    store = ObjectStore.open_location(Output.model_validate(OUTPUT), environment=environment, retry_seconds=5)
    store.put("own", b"1")  # a session token of the other Secret would be refused
    assert store.get("own") == b"1"


@pytest.mark.s3
def test_a_wrong_secret_of_its_own_is_not_helped_out_by_another(s3_server: Any) -> None:
    wrong = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    environment = {
        **s3_server.environment,
        **_prefixed("other", s3_server.environment),
        **_prefixed("own", wrong),
    }
    store = ObjectStore.open_location(Output.model_validate(OUTPUT), environment=environment, retry_seconds=5)
    with pytest.raises(StorageError) as caught:
        store.put("x", b"1")
    assert str(caught.value).startswith(
        "Could not write s3://bucket/apart/x: the credentials were not accepted (SignatureDoesNotMatch)"
    )


@pytest.mark.s3
def test_another_uri_of_the_same_block_is_opened_with_its_secret(s3_server: Any) -> None:
    source = DataSource.model_validate({"uri": "s3://bucket/in/*.jsonl", "credentials": {"secretName": "own"}})
    environment = _prefixed("own", s3_server.environment)
    store = ObjectStore.open_location(source, uri="s3://bucket/in/", environment=environment, retry_seconds=5)
    store.put("a.jsonl", b"{}\n")
    assert [info.path for info in store.list()] == ["a.jsonl"]


def _prefixed(secret: str, values: dict[str, str]) -> dict[str, str]:
    return {f"FINETUNE_ENV_{secret.upper()}__{name}": value for name, value in values.items()}
