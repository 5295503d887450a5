from __future__ import annotations

from pathlib import Path

import pytest
from tests.unit.trainer.data.rig import Workbench


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    """A workbench with a ChatML tokenizer."""
    return Workbench(tmp_path)
