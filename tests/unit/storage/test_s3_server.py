"""The command that the demo uses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.s3 import server_module

_SERVER = Path(__file__).parents[3] / "deploy" / "local" / "s3" / "server.py"
_CLIENT = """
from finetune_storage import ObjectStore
store = ObjectStore.open("s3://demo/x")
store.put("a", b"1")
print(store.get("a"), store.uri)
"""


@pytest.mark.s3
def test_a_command_runs_beside_a_server_and_its_status_is_passed_on(s3_server: Any, tmp_path: Path) -> None:
    start = [sys.executable, str(_SERVER), "run", "--dir", str(tmp_path), "--bucket", "demo", "--"]
    done = subprocess.run([*start, sys.executable, "-c", _CLIENT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "b'1' s3://demo/x/\n")
    assert (tmp_path / "buckets" / "demo" / "x" / "a").read_bytes() == b"1"
    failed = subprocess.run([*start, "sh", "-c", "exit 7"], capture_output=True, text=True, check=False)
    assert failed.returncode == 7


@pytest.mark.s3
def test_a_server_in_the_background_is_stopped_again(s3_server: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(_SERVER)]
    started = subprocess.run([*command, "start", "--dir", str(tmp_path)], capture_output=True, text=True, check=True)
    exported = dict(line.removeprefix("export ").split("=", 1) for line in started.stdout.splitlines())
    code = _CLIENT.replace("demo", "finetune")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **exported}, text=True, stdout=subprocess.PIPE
    )
    assert done.stdout == "b'1' s3://finetune/x/\n"
    assert (tmp_path / "server.json").stat().st_mode & 0o077 == 0
    subprocess.run([*command, "stop", "--dir", str(tmp_path)], check=True)
    assert not (tmp_path / "server.json").exists()


def test_without_a_server_and_without_go_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path))
    module = server_module()
    with pytest.raises(module.ServerUnavailable) as caught:
        module.binary()
    assert str(caught.value) == (
        "No S3 server: neither 'versitygw' nor 'go' is on PATH; install Go >= 1.25 or put versitygw v1.8.0 on PATH."
    )
