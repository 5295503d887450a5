"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from tests.s3 import server_module
from tests.tiers import cannot_run

# A change is judged by what it changes: the same examples every time, however busy the machine. To look for new ones:
# HYPOTHESIS_PROFILE=explore
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running S3 server with a bucket ``bucket``; tests must not stop it."""
    server = _start(tmp_path_factory.mktemp("s3"))
    server.create_bucket("bucket")
    yield server
    server.stop()


@pytest.fixture
def own_s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running S3 server that a test may stop and start again."""
    server = _start(tmp_path_factory.mktemp("s3"))
    server.create_bucket("bucket")
    yield server
    server.stop()


def _start(directory: Any) -> Any:
    module = server_module()
    try:
        return module.S3Server(directory).start()
    except module.ServerUnavailable as error:
        cannot_run("S3", error)
