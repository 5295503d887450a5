"""Two Secrets with the same keys: every location is opened with its own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from finetune_api.spec import DataSource, Output
from finetune_storage import ObjectStore, StorageError

OUTPUT = {"uri": "s3://bucket/apart", "credentials": {"secretName": "own"}}


@pytest.mark.s3
@pytest.mark.parametrize("prefix", ["", "FINETUNE_ENV__"], ids=["on a workstation", "in a pod"])
def test_a_location_without_a_secret_is_opened_with_what_all_share(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    values = {prefix + name: value for name, value in s3_server.environment.items()}
    _become_a_pod(monkeypatch, values | _of("other", {"AWS_ACCESS_KEY_ID": "wrong"}))
    store = ObjectStore.open_location(Output.model_validate({"uri": "s3://bucket/apart"}), retry_seconds=5)
    store.put("plain", b"1")
    assert store.get("plain") == b"1"


@pytest.mark.s3
def test_a_location_is_opened_with_its_own_secret_only(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "of-another-store", "AWS_SESSION_TOKEN": "another"}
    shared = {f"FINETUNE_ENV__{name}": value for name, value in other.items()}
    _become_a_pod(monkeypatch, shared | _of("other", other) | _of("own", s3_server.environment))
    store = ObjectStore.open_location(Output.model_validate(OUTPUT), retry_seconds=5)
    store.put("own", b"1")  # with the other Secret's session token the server would refuse
    assert store.get("own") == b"1"


@pytest.mark.s3
def test_a_wrong_secret_is_not_helped_out_by_another(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**s3_server.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}
    _become_a_pod(monkeypatch, _of("other", s3_server.environment) | _of("own", wrong))
    store = ObjectStore.open_location(Output.model_validate(OUTPUT), retry_seconds=5)
    with pytest.raises(StorageError) as caught:
        store.put("x", b"1")
    assert str(caught.value).startswith(
        "Could not write s3://bucket/apart/x: the credentials were not accepted (SignatureDoesNotMatch)"
    )


@pytest.mark.s3
def test_another_uri_of_the_same_block_is_opened_with_its_secret(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _become_a_pod(monkeypatch, _of("own", s3_server.environment))
    source = DataSource.model_validate({"uri": "s3://bucket/in/*.jsonl", "credentials": {"secretName": "own"}})
    store = ObjectStore.open_location(source, uri="s3://bucket/in/", retry_seconds=5)
    store.put("a.jsonl", b"{}\n")
    assert [info.path for info in store.list()] == ["a.jsonl"]


def _of(secret: str, values: dict[str, str]) -> dict[str, str]:
    return {f"FINETUNE_ENV_{secret.upper()}__{name}": value for name, value in values.items()}


def _become_a_pod(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """The process's own variables, because the library below storage reads them too."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FINETUNE_ENV_"))]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
