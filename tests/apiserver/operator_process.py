"""The operator as a process of its own, and a watchman that starts it again whenever it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.apiserver.kube import wait

from finetune_api.status import FineTuneJobStatus

TRAINER_IMAGE = "registry.example/finetune-trainer:test"

# Linux ends a process with the *thread* that forked it, and tests start operators from threads that come and go: all
# are forked by this one, which lives as long as its process, however that ends.
_FORKS = ThreadPoolExecutor(1)
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; stays through exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def settings(namespace: str, **changes: Any) -> dict[str, Any]:
    """Settings for one namespace, without a lease (a killed holder's lease lasts for 15 s) and on free ports."""
    return {
        "namespaces": [namespace],
        "trainerImage": TRAINER_IMAGE,
        "podDefaults": {"terminationGracePeriodSeconds": 30},
        "progress": {"intervalSeconds": 1, "timeoutSeconds": 2},
        "lease": {"enabled": False},
        "metrics": {"port": 0},
        "health": {"port": 0},
        "log": {"format": "text", "level": "debug"},
        **changes,
    }


class OperatorProcess:
    """``python -m finetune_operator`` with a kubeconfig; its log is in ``folder``/operator.log. Dies with pytest."""

    def __init__(self, folder: Path, kubeconfig: Path, configuration: dict[str, Any]) -> None:
        self.folder = folder
        self.starts = 0
        self.started = 0.0  # the last time, by time.monotonic()
        self.exits: list[int] = []
        self._kubeconfig = kubeconfig
        self._config = folder / "operator.json"
        self.configure(configuration)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._watchman: threading.Thread | None = None

    def configure(self, configuration: dict[str, Any]) -> None:
        """Other settings, from the next start on."""
        self._config.write_text(json.dumps(configuration))

    @property
    def log(self) -> str:
        return (self.folder / "operator.log").read_text()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, *, again: bool = False) -> None:
        """Start it; ``again``: and start it anew whenever it dies, until :meth:`stop`."""
        self._spawn()
        if again:
            self._watchman = threading.Thread(target=self._watch, daemon=True)
            self._watchman.start()

    def kill(self) -> None:
        """SIGKILL, now: nothing of it runs any more when this returns."""
        with self._lock:
            assert self._process is not None
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that takes too long; the exit code."""
        self._halt.set()
        if self._watchman is not None:
            self._watchman.join()
        with self._lock:
            if self._process is None:
                return 0
            if self._process.poll() is None:
                self._process.terminate()
            try:
                return self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise

    def close(self) -> None:
        """End it at once, without asking."""
        self._halt.set()
        if self._watchman is not None:
            self._watchman.join()
        if self.alive:
            self.kill()

    def _spawn(self) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH") if name in os.environ}
        environment |= {"KUBECONFIG": str(self._kubeconfig), "PYTHONUNBUFFERED": "1"}
        guarded = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        command = [*guarded, "-m", "finetune_operator", "--config", str(self._config)]
        with self._lock, (self.folder / "operator.log").open("ab") as log:
            self.starts += 1
            self.started = time.monotonic()
            self._process = _FORKS.submit(
                subprocess.Popen,
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).result()

    def _watch(self) -> None:
        while not self._halt.wait(0.02):
            assert self._process is not None
            code = self._process.poll()
            if code is not None:
                self.exits.append(code)
                self._spawn()


def wait_stopped(operator: OperatorProcess, seconds: float = 15.0) -> None:
    wait(lambda: not operator.alive, "the operator has ended", seconds)


def parse_status(job: dict[str, Any]) -> FineTuneJobStatus:
    """The status as its class: a status that does not parse is a defect."""
    return FineTuneJobStatus.model_validate_json(json.dumps(job.get("status", {})), strict=True)
