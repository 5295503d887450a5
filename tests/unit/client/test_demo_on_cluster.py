"""How the demo hands names of images to the chart."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
DIGEST = "sha256:" + "ab" * 32


@pytest.fixture(scope="module")
def on_cluster() -> Iterator[ModuleType]:
    """A module of examples/demo, which is no package; its neighbours have names of their own only there."""
    known, path = set(sys.modules), [*sys.path]
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    try:
        yield importlib.import_module("on_cluster")
    finally:
        sys.path[:] = path
        for name in {"on_cluster", "run", "corpus"} - known:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("finetune-operator:1.2", {"repository": "finetune-operator", "tag": "1.2"}),
        ("registry:5000/team/x:1.2", {"repository": "registry:5000/team/x", "tag": "1.2"}),
        ("registry:5000/x", {"repository": "registry:5000/x", "tag": "latest"}),
        (f"ghcr.io/team/x@{DIGEST}", {"repository": "ghcr.io/team/x", "digest": DIGEST}),
        (f"registry:5000/x:1.2@{DIGEST}", {"repository": "registry:5000/x", "digest": DIGEST}),
    ],
)
def test_an_image_is_taken_apart_as_the_chart_names_its_parts(
    on_cluster: ModuleType, name: str, values: dict[str, str]
) -> None:
    assert on_cluster.image_values(name) == values
