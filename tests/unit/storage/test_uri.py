from __future__ import annotations

import pytest

from finetune_storage import ObjectStore, StorageError, parse_uri, split_uri


@pytest.mark.parametrize(
    ("uri", "scheme", "bucket", "path"),
    [
        ("s3://bucket/a/b.json", "s3", "bucket", "a/b.json"),
        ("gs://bucket/", "gs", "bucket", ""),
        ("az://container/x", "az", "container", "x"),
        ("file:///data/with%20space/", "file", "", "/data/with space/"),
        ("file://localhost/data/../x", "file", "", "/x"),
    ],
)
def test_a_uri_is_taken_apart(uri: str, scheme: str, bucket: str, path: str) -> None:
    locator = parse_uri(uri)
    assert (locator.scheme, locator.bucket, locator.path) == (scheme, bucket, path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("data/train.jsonl", "A storage URI has no scheme; write one of file://, s3://, gs://, az://."),
        ("ftp://host/x", "A storage URI has scheme 'ftp'; write one of file://, s3://, gs://, az://."),
        ("file://data/x", "'file://data/x' is not absolute; write file:///ABSOLUTE/PATH with three slashes."),
        ("s3:///x", "'s3:///x' names no bucket; write s3://BUCKET/PATH."),
        ("s3://bucket/../other", "'s3://bucket/../other' contains '.' or '..'; write the path out."),
        (
            "s3://AKIA:topsecret@bucket/x",
            "A s3:// URI holds user information before '@'; credentials belong in environment variables, "
            "remove them from the URI.",
        ),
        (
            "az://container/x?sig=topsecret",
            "The URI of bucket 'container' holds a query string; remove it, "
            "credentials and signatures belong in environment variables.",
        ),
    ],
)
def test_a_bad_uri_is_refused_with_a_sentence_and_without_its_secrets(uri: str, message: str) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open(uri)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        (
            "http://user:topsecret@host",
            "The storage endpoint holds user information before '@'; credentials belong in environment variables.",
        ),
        (
            "host:9000",
            "The storage endpoint 'host:9000' is not an http:// or https:// URL; "
            "write for instance https://s3.example.com.",
        ),
    ],
)
def test_a_bad_endpoint_is_refused(endpoint: str, message: str) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("s3://bucket/x", endpoint=endpoint)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("uri", "parent", "rest"),
    [
        ("s3://b/data/*.jsonl", "s3://b/data/", "*.jsonl"),
        ("s3://b/*/part-?.parquet", "s3://b/", "*/part-?.parquet"),
        ("s3://b/train.jsonl", "s3://b/", "train.jsonl"),
        ("s3://b/data/", "s3://b/data/", ""),
        ("file:///x/a.jsonl", "file:///x/", "a.jsonl"),
    ],
)
def test_a_uri_splits_before_its_first_wildcard(uri: str, parent: str, rest: str) -> None:
    assert split_uri(uri) == (parent, rest)


@pytest.mark.parametrize(("text", "refused"), [("5", False), ("soon", True), ("-1", True)])
def test_the_retry_budget_comes_from_the_environment(text: str, refused: bool) -> None:
    environment = {"FINETUNE_STORAGE_RETRY_SECONDS": text}
    if refused:
        with pytest.raises(StorageError) as caught:
            ObjectStore.open("s3://bucket/x", environment=environment)
        assert str(caught.value) == (
            f"FINETUNE_STORAGE_RETRY_SECONDS is '{text}'; set it to seconds between 0 and 86400."
        )
    else:
        assert ObjectStore.open("s3://bucket/x", environment=environment).retry_seconds == 5.0


def test_azure_without_an_account_names_the_variables() -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("az://container/x")
    assert str(caught.value) == (
        "The credentials for az://container cannot be used: set "
        "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY."
    )
