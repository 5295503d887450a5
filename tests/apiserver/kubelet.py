"""The test as scheduler and kubelet: binds pods, says what their containers do, and serves their /progress for real."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.apiserver.kube import Document, Kube, Refused

from finetune_api.exits import ExitClass
from finetune_api.report import Progress, Termination

PORT = 9464  # of every launcher
INDEX = "batch.kubernetes.io/job-completion-index"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Launcher:
    """The HTTP side of one pod: a real server on a loopback address of its own, where the operator finds it."""

    def __init__(self) -> None:
        self.page: Progress | None = None
        self.pulls = 0
        while True:
            self.address = f"127.{random.randint(64, 250)}.{random.randint(0, 250)}.{random.randint(1, 250)}"
            try:
                self._server = ThreadingHTTPServer((self.address, PORT), self._handler())
                break
            except OSError:
                continue  # another test has it
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(launcher) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                launcher.pulls += 1
                if self.path != "/progress" or launcher.page is None:
                    self.send_error(404)
                    return
                body = launcher.page.model_dump_json(by_alias=True).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):  # the operator was killed while it read
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler


class Kubelet:
    """All nodes of one namespace. A background loop binds and runs new pods and ends those that are deleted.

    ``page(index)`` is what the launcher of a new pod says first; ``last_words(index)`` what it says on SIGTERM.
    """

    def __init__(self, kube: Kube) -> None:
        self.kube = kube
        self.schedules = True  # False: pods stay unschedulable
        self.removes = True  # False: pods that were deleted and have ended can still be read
        self.page: Callable[[int], Progress | None] = lambda index: None
        self.last_words: Callable[[int], Termination] = lambda index: Termination(
            exit_class=ExitClass.INTERRUPTED, exit_code=ExitClass.INTERRUPTED.code, message="stopped by SIGTERM"
        )
        self._launchers: dict[str, Launcher] = {}  # by pod uid
        self._halt = threading.Event()
        self._lock = threading.RLock()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.errors: list[str] = []

    @contextmanager
    def running(self) -> Iterator[Kubelet]:
        self._thread.start()
        try:
            yield self
        finally:
            self._halt.set()
            self._thread.join(10)
            for launcher in self._launchers.values():
                launcher.close()
            assert self.errors == []

    # ---- what the test asks for

    def pods(self) -> list[Document]:
        """Pods that have not ended and are not being deleted, by index."""
        alive = [
            pod
            for pod in self.kube.list("Pod")
            if pod["status"].get("phase") in {"Pending", "Running"} and "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(alive, key=index_of)

    def pod(self, index: int) -> Document:
        return next(pod for pod in self.pods() if index_of(pod) == index)

    def say(self, index: int, page: Progress) -> None:
        """The launcher of the running pod with this index now serves ``page``."""
        with self._lock:
            self._launchers[self.pod(index)["metadata"]["uid"]].page = page

    def end(self, index: int, termination: Termination, *, reason: str = "") -> None:
        """The container exits with ``termination`` in its termination message."""
        with self._lock:
            self._end(self.pod(index), termination, reason or ("Completed" if not termination.exit_code else "Error"))

    def evict(self, index: int, message: str) -> None:
        """The kubelet evicts the pod for want of memory on the node; the container is killed and says nothing."""
        with self._lock:
            pod = self.pod(index)
            status = _ended(pod, 137, "Error", "")
            status |= {"reason": "Evicted", "message": message}
            status["conditions"] += [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "TerminationByKubelet",
                    "message": message,
                    "lastTransitionTime": now(),
                }
            ]
            self._put(pod, status)
            self._hang_up(pod)

    # ---- the loop

    def _loop(self) -> None:
        while not self._halt.wait(0.2):
            try:
                with self._lock:
                    for pod in self.kube.list("Pod"):
                        self._look(pod)
            except Refused as error:
                if error.code not in {404, 409}:
                    self.errors.append(str(error))
            except Exception as error:
                if not self._halt.is_set():
                    self.errors.append(f"{type(error).__name__}: {error}")

    def _look(self, pod: Document) -> None:
        metadata, phase = pod["metadata"], pod["status"].get("phase")
        if "deletionTimestamp" in metadata:
            if phase in {"Pending", "Running"}:
                words = self.last_words(index_of(pod))
                self._end(pod, words, "Error" if words.exit_code else "Completed")
            elif self.removes and metadata.get("deletionGracePeriodSeconds") != 0:
                self.kube.delete("Pod", metadata["name"], grace_seconds=0)
        elif phase == "Pending" and not self.schedules:
            self._refuse(pod)
        elif phase == "Pending" and "nodeName" not in pod["spec"]:
            self._bind(pod)
        elif phase == "Pending":
            self._start(pod)

    def _refuse(self, pod: Document) -> None:
        message = "0/2 nodes are available: 2 Insufficient cpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        if condition.items() <= next(iter(pod["status"].get("conditions", [])), {}).items():
            return
        self._put(pod, {"phase": "Pending", "conditions": [{**condition, "lastTransitionTime": now()}]})

    def _bind(self, pod: Document) -> None:
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": f"n{index_of(pod) + 1}"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self.kube.call("POST", self.kube.path("Pod", name, subresource="binding"), binding)

    def _start(self, pod: Document) -> None:
        launcher = self._launchers[pod["metadata"]["uid"]] = Launcher()
        launcher.page = self.page(index_of(pod))
        container = pod["spec"]["containers"][0]
        started = now()
        self._put(
            pod,
            {
                "phase": "Running",
                "podIP": launcher.address,
                "podIPs": [{"ip": launcher.address}],
                "startTime": started,
                "conditions": _conditions(ready=True),
                "containerStatuses": [
                    {
                        "name": container["name"],
                        "image": container["image"],
                        "imageID": "",
                        "ready": True,
                        "started": True,
                        "restartCount": 0,
                        "state": {"running": {"startedAt": started}},
                    }
                ],
            },
        )

    def _end(self, pod: Document, termination: Termination, reason: str) -> None:
        message = termination.model_dump_json(by_alias=True, exclude_defaults=True)
        self._put(pod, _ended(pod, termination.exit_code, reason, message))
        self._hang_up(pod)

    def _hang_up(self, pod: Document) -> None:
        if launcher := self._launchers.pop(pod["metadata"]["uid"], None):
            launcher.close()

    def _put(self, pod: Document, status: Document) -> None:
        name = pod["metadata"]["name"]
        self.kube.patch("Pod", name, {"status": status}, subresource="status", fieldManager="kubelet")


def index_of(pod: Document) -> int:
    return int(pod["metadata"]["labels"][INDEX])


def _conditions(*, ready: bool) -> list[Document]:
    word = "True" if ready else "False"
    return [
        {"type": kind, "status": status, "lastTransitionTime": now()}
        for kind, status in (
            ("PodScheduled", "True"),
            ("Initialized", "True"),
            ("ContainersReady", word),
            ("Ready", word),
        )
    ]


def _ended(pod: Document, exit_code: int, reason: str, message: str) -> Document:
    container = pod["spec"]["containers"][0]
    known = next(iter(pod["status"].get("containerStatuses", [])), {})
    started = known.get("state", {}).get("running", {}).get("startedAt", now())
    terminated = {"exitCode": exit_code, "reason": reason, "startedAt": started, "finishedAt": now()}
    if message:
        terminated["message"] = message
    return {
        "phase": "Failed" if exit_code else "Succeeded",
        "conditions": _conditions(ready=False),
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": False,
                "started": False,
                "restartCount": 0,
                # A merge patch keeps what it does not name: the running state has to go.
                "state": {"running": None, "terminated": terminated},
            }
        ],
    }


def page_of(text: str) -> Progress:
    """A page from its JSON."""
    return Progress.model_validate(json.loads(text))
