"""The operator as a process: started with its real entry point, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.apiserver.server import _die_with_parent

from bench.scale.plane import OPERATOR, OPERATOR_NAMESPACE, Plane
from finetune_operator.kube import PROGRESS_MANAGER

_METRICS_PORT, _HEALTH_PORT = 18080, 18081  # of the measurement's own network namespace
_WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
SETTINGS: dict[str, Any] = {
    "trainerImage": "localhost/finetune-trainer:scale",
    "lease": {"namespace": OPERATOR_NAMESPACE},
    "metrics": {"port": _METRICS_PORT},
    "health": {"port": _HEALTH_PORT},
}


@dataclass(frozen=True)
class Request:
    """One finished request of the operator, from the audit log."""

    at: str  # RFC 3339, when it came in
    verb: str
    resource: str  # with the subresource: finetunejobs/status
    name: str
    code: int
    uri: str

    @property
    def is_progress(self) -> bool:
        """A page of progress and nothing else: news of a job that runs."""
        return f"fieldManager={PROGRESS_MANAGER}" in self.uri

    @property
    def writes(self) -> bool:
        return self.verb in _WRITES

    @property
    def is_lease(self) -> bool:
        return self.resource == "leases"


class OperatorProcess:
    """One run of the operator against ``plane``. Dies with this process."""

    def __init__(self, plane: Plane, wrapper: tuple[str, ...] = ()) -> None:
        self.plane = plane
        self._wrapper = wrapper
        self._config = plane.directory / "operator.json"
        self._config.write_text(json.dumps(SETTINGS))
        self._kubeconfig = plane.operator_kubeconfig()
        self._log = plane.directory / "operator.log"
        self.started = 0.0

    def start(self) -> None:
        """Returns at once."""
        command = [*self._wrapper, sys.executable, "-m", "finetune_operator", "--config", str(self._config)]
        self.started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "KUBECONFIG": str(self._kubeconfig), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )

    def wait_ready(self, seconds: float = 60) -> float:
        """Until /readyz says so and this replica leads; seconds since the start."""
        while True:
            if self._page("readyz", _HEALTH_PORT) and "finetune_operator_leader 1.0" in self._page(
                "metrics", _METRICS_PORT
            ):
                return time.monotonic() - self.started
            self.check()
            if time.monotonic() - self.started > seconds:
                raise RuntimeError(f"The operator was not ready after {seconds:g} s; its log: {self._log}.")
            time.sleep(0.05)

    def wait_listed(self, state: str, jobs: int, seconds: float = 120) -> None:
        """Until it has seen ``jobs`` FineTuneJobs in ``state`` and its queue is empty."""
        wanted = {f'finetune_operator_jobs{{state="{state}"}} {float(jobs)}', "finetune_operator_queue_depth 0.0"}
        deadline = time.monotonic() + seconds
        while not wanted <= set(self._page("metrics", _METRICS_PORT).splitlines()):
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"The operator has not seen {jobs:,} jobs in state {state} after {seconds:g} s.")
            time.sleep(0.5)

    def check(self) -> None:
        """Fails with the operator's last words if it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(f"The operator ended: {self._log.read_text()[-1000:]}")

    def stop(self) -> float:
        """SIGTERM; seconds until it has ended."""
        started = time.monotonic()
        self._process.terminate()
        self._process.wait(30)
        return time.monotonic() - started

    def cpu_seconds(self) -> float:
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def memory(self) -> tuple[int, int]:
        """Resident bytes: now, and the most so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024

    def requests(self, since: str = "", until: str = "9") -> Iterator[Request]:
        """Its finished requests, oldest first; RFC 3339 bounds."""
        with self.plane.server.audit_log.open() as lines:
            for line in lines:
                if OPERATOR not in line:
                    continue
                event = json.loads(line)
                if event["user"]["username"] != OPERATOR or not since <= event["requestReceivedTimestamp"] < until:
                    continue
                reference = event.get("objectRef", {})
                resource = "/".join(filter(None, (reference.get("resource"), reference.get("subresource"))))
                code = event.get("responseStatus", {}).get("code", 0)
                received = event["requestReceivedTimestamp"]
                yield Request(received, event["verb"], resource, reference.get("name", ""), code, event["requestURI"])

    def _page(self, path: str, port: int) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=2) as response:
                return str(response.read().decode())
        except (urllib.error.URLError, OSError):
            return ""


def tally(requests: Iterator[Request]) -> dict[str, int]:
    """How often which verb met which resource with which answer, the most frequent first."""
    counted = Counter(f"{one.verb} {one.resource} {one.code}" for one in requests)
    return dict(counted.most_common())
