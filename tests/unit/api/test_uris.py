"""What is shown of a URI that is refused."""

from __future__ import annotations

import pytest

from finetune_api.uris import without_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/part-1.jsonl", "s3://bucket/part-1.jsonl"),
        ("s3://AKIA:topsecret@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:top/secret@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:top#secret@bucket/x", "s3://***"),
        ("s3://bucket/x?sig=top@secret", "s3://***"),
        ("s3://bucket/x?X-Amz-Signature=topsecret", "s3://bucket/x?***"),
        ("https://bucket.s3.amazonaws.com/x?sig=topsecret", "https://bucket.s3.amazonaws.com/x?***"),
        ("https://minio:9000#topsecret", "https://minio:9000#***"),
        ("bucket/x?sig=topsecret", "bucket/x?***"),
        ("hf://org/base@main", "hf://org/base@main"),
        ("hf://user:top/secret@hub/org/base", "hf://***@hub/org/base"),
    ],
)
def test_no_secret_is_shown(uri: str, shown: str) -> None:
    assert without_secrets(uri) == shown
