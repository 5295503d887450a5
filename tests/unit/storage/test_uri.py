from __future__ import annotations

import pytest

from finetune_storage import ObjectStore, StorageError, parse_uri, split_uri


@pytest.mark.parametrize(
    ("uri", "scheme", "bucket", "path"),
    [
        ("s3://bucket/a/b.json", "s3", "bucket", "a/b.json"),
        ("gs://bucket/", "gs", "bucket", ""),
        ("az://container/x", "az", "container", "x"),
        ("s3://bucket/day=1/part-?.jsonl", "s3", "bucket", "day=1/part-?.jsonl"),
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
            "A az:// URI holds a query string after '?'; remove it, "
            "credentials and signatures belong in environment variables.",
        ),
        (
            "s3://evil.example?sig=topsecret/x",
            "A s3:// URI holds a query string after '?'; remove it, "
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
        (
            "https://host/x?sig=topsecret",
            "The storage endpoint 'https://host/x?***' is not an http:// or https:// URL; "
            "write for instance https://s3.example.com.",
        ),
        (
            "https://evil.example\\.s3.example",
            "The storage endpoint 'https://evil.example\\.s3.example' is not an http:// or https:// URL; "
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


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize(
    "bucket", ["evil.example?", "evil.example#", "evil\\", "evil:80", "[::1]", "a%2f", ".a", "-a", "a b", "ä", "a\n"]
)
def test_a_bucket_that_would_end_a_host_name_is_refused(scheme: str, bucket: str) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open(f"{scheme}://{bucket}/x", endpoint="https://s3.example", path_style=False)
    assert str(caught.value) == (
        f"A {scheme}:// URI names a bucket that cannot exist; "
        "use letters, digits, '.', '_' and '-' after a letter or digit."
    )


@pytest.mark.parametrize(
    ("uri", "environment", "message"),
    [
        (
            "az://c/x",
            {"AZURE_STORAGE_ACCOUNT_NAME": "evil.example/?", "AZURE_STORAGE_ACCOUNT_KEY": "AAAA"},
            "AZURE_STORAGE_ACCOUNT_NAME is no name of a storage account; write 3 to 24 lower-case letters and digits.",
        ),
        (
            "gs://b/x",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "p", "gcs_base\\u005furl": "https://evil.example"}'},
            "GOOGLE_SERVICE_ACCOUNT_KEY names a server in gcs_base_url; remove it from the key, "
            "and name the server as the endpoint.",
        ),
        (
            "gs://b/x",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": "topsecret"},
            "The credentials for gs://b cannot be used: one of GOOGLE_SERVICE_ACCOUNT_KEY is malformed.",
        ),
        (
            "gs://b/x",
            {"GOOGLE_BASE_URL": "https://user:topsecret@host", "GOOGLE_SKIP_SIGNATURE": "true"},
            "The storage endpoint holds user information before '@'; credentials belong in environment variables.",
        ),
        (
            "s3://b/x",
            {"AWS_REGION": "evil.example/?"},
            "The region (AWS_REGION, AWS_DEFAULT_REGION or the region field) is none; "
            "use letters, digits, '_' and '-', such as eu-central-1.",
        ),
    ],
    ids=["account", "key with a server", "key that is none", "base URL", "region"],
)
def test_a_variable_that_says_who_cannot_say_where(uri: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(StorageError) as caught:
        ObjectStore.open(uri, environment=environment)
    assert str(caught.value) == message


@pytest.mark.parametrize("endpoint", ["https://10.0.0.1:9000", "http://[::1]:9000"])
def test_a_bucket_cannot_stand_before_a_number(endpoint: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with pytest.raises(StorageError) as caught:
        ObjectStore.open("s3://bucket/x", endpoint=endpoint, path_style=False, environment=keys)
    assert str(caught.value) == (
        f"The storage endpoint '{endpoint}' has a number for a host, which no bucket can stand before; "
        "set pathStyle: true."
    )
