"""What an image's code layer is like does not depend on how private the builder keeps a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.chart import ROOT


def test_everybody_may_read_what_was_sealed_under_whatever_umask_it_was_checked_out(tmp_path: Path) -> None:
    package = tmp_path / "app/package"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "data.json", "program.sh"):
        (package / name).write_text("")
    for path in (package.parent, *package.parent.rglob("*")):
        path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    command = [sys.executable, str(ROOT / "deploy/image/seal.py"), str(ROOT / "pyproject.toml"), str(package.parent)]
    subprocess.run(command, check=True, umask=0o077)
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for path in (package.parent, *package.parent.rglob("*"))
    }
    compiled = f"__init__.{sys.implementation.cache_tag}.pyc"
    assert {f"app/package/__pycache__/{compiled}", f"app/package/inner/__pycache__/{compiled}"} <= modes.keys()
    assert [name for name in modes if os.path.basename(name) == "METADATA"] != []
    wrong = {
        name: oct(mode)
        for name, mode in modes.items()
        if mode != (0o755 if (tmp_path / name).is_dir() or name.endswith(".sh") else 0o644)
    }
    assert wrong == {}
