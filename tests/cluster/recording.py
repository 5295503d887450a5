"""Everything that can be seen of a namespace while jobs live in it: versions of objects, logs, processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.cluster.layout import API_PORT, HOST, Layout

_WATCHED = {
    "finetunejobs": "/apis/finetune.dev/v1alpha1",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "configmaps": "/api/v1",
    "events": "/api/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
}
_SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Process:
    """A process of a pod, as the machine's kernel knows it."""

    pod: str
    command: str
    users: tuple[int, ...]  # real, effective, saved, file system
    groups: tuple[int, ...]  # the same four, then the supplementary ones
    capabilities: int  # effective, permitted and bounding, or-ed
    gains_rights: bool  # by execve
    seccomp: int  # 2: filtered


@dataclass
class Seen:
    """What a recording found."""

    versions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # every version of every object, by plural
    logs: dict[str, str] = field(default_factory=dict)  # by pod
    processes: set[Process] = field(default_factory=set)

    def of(self, plural: str, name: str) -> list[dict[str, Any]]:
        """All versions of one object, oldest first."""
        return [version for version in self.versions[plural] if version["metadata"]["name"] == name]

    def states(self, job: str) -> list[str]:
        """The states that a FineTuneJob went through."""
        states = [version.get("status", {}).get("state", "") for version in self.of("finetunejobs", job)]
        return [state for state, before in zip(states, ["", *states], strict=False) if state and state != before]


class Recorder:
    """Watches with threads of its own until ``stop``."""

    def __init__(self, layout: Layout, namespace: str) -> None:
        self.seen = Seen({plural: [] for plural in _WATCHED})
        self._context = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
        self._context.load_cert_chain(layout.pki / "admin.crt", layout.pki / "admin.key")
        self._namespace = namespace
        self._pods: dict[str, str] = {}  # uid -> name
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        for plural in _WATCHED:
            self._start(self._watch, plural)
        self._start(self._sample)

    def stop(self) -> Seen:
        """The recording is complete; what ends later is not seen."""
        self._stopping.set()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)
        return self.seen

    def _start(self, work: Callable[..., None], *arguments: str) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- objects

    def _watch(self, plural: str) -> None:
        path = f"{_WATCHED[plural]}/namespaces/{self._namespace}/{plural}?watch=1"
        while not self._stopping.is_set():
            for line in self._lines(path) or ():
                event = json.loads(line)
                if event["type"] in {"ADDED", "MODIFIED", "DELETED"}:
                    self.seen.versions[plural].append(event["object"])
                    if plural == "pods":
                        self._saw_pod(event["object"]["metadata"])

    def _saw_pod(self, metadata: dict[str, Any]) -> None:
        if metadata["uid"] not in self._pods:
            self._pods[metadata["uid"]] = metadata["name"]
            self._start(self._follow, metadata["name"])

    def _follow(self, pod: str) -> None:
        """All that its container prints."""
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/log?follow=true"
        self.seen.logs[pod] = ""
        while not self._stopping.is_set():
            # asked before the request: refused to a pod that had ended by then, there is no log and never will be
            phases = [v.get("status", {}).get("phase") for v in self.seen.of("pods", pod)[-1:]]
            lines = self._lines(path)
            if lines is not None:
                self.seen.logs[pod] = ""
                for line in lines:
                    self.seen.logs[pod] += line.decode(errors="replace")
                return
            if phases in ([], ["Failed"], ["Succeeded"]):
                return
            time.sleep(0.2)  # its container does not run yet

    def _lines(self, path: str) -> Iterator[bytes] | None:
        """Lines of an endless answer, or None where the server refuses."""
        connection = http.client.HTTPSConnection(HOST, API_PORT, context=self._context)
        connection.request("GET", path)
        connected = connection.sock
        self._sockets.add(connected)
        response = connection.getresponse()
        if response.status != 200:
            self._sockets.discard(connected)
            connection.close()
            return None

        def read() -> Iterator[bytes]:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while line := response.readline():
                    yield line
            self._sockets.discard(connected)
            connection.close()

        return read()

    # ---- processes

    def _sample(self) -> None:
        while not self._stopping.wait(_SAMPLE_SECONDS):
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    self._look_at(path)

    def _look_at(self, path: Path) -> None:
        group = (path / "cgroup").read_text()
        pod = next((name for uid, name in list(self._pods.items()) if uid in group), None)
        if pod is None:
            return
        command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        if not command or command.startswith(("runc ", "/proc/self/exe init")):  # becomes the container's user later
            return
        found = dict(line.split(":\t", 1) for line in (path / "status").read_text().splitlines() if ":\t" in line)
        process = Process(
            pod,
            command.strip(),
            tuple(map(int, found["Uid"].split())),
            tuple(map(int, f"{found['Gid']} {found['Groups']}".split())),
            int(found["CapEff"], 16) | int(found["CapPrm"], 16) | int(found["CapBnd"], 16),
            found["NoNewPrivs"] != "1",
            int(found["Seccomp"]),
        )
        self.seen.processes.add(process)
