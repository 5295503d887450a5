"""What happens where a machine cannot run a tier of the tests: it says so loudly, and fails where all have to run."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def required() -> bool:
    """Whether every tier has to run here (`.ci/run` sets FINETUNE_REQUIRE_CLUSTER, most CI systems set CI)."""
    return bool(os.environ.get("CI") or os.environ.get("FINETUNE_REQUIRE_CLUSTER"))


def cannot_run(tests: str, why: object) -> NoReturn:
    """Fail, or skip where nobody requires them. ``tests``: which, as in ``S3``."""
    text = f"THE {tests.upper()} TESTS DO NOT RUN ON THIS MACHINE: {why}"
    if required():
        pytest.fail(text, pytrace=False)
    pytest.skip(text)
