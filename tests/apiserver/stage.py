"""A stage for one life: a namespace, a proxy, an operator behind it, and a kubelet; and what came of the play."""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.apiserver.kube import Kube, wait
from tests.apiserver.kubelet import Kubelet
from tests.apiserver.life import LIVES, History, Life, events_of, history_of
from tests.apiserver.operator_process import OperatorProcess, settings
from tests.apiserver.proxy import Proxy, Seen
from tests.apiserver.server import RunningServer

_LINES = 60  # of requests and log that a failure shows


@dataclass
class Stage:
    """Everything around one job."""

    kube: Kube
    proxy: Proxy
    operator: OperatorProcess
    kubelet: Kubelet

    def watching(self) -> None:
        """Wait until the operator, as it was started last, watches both kinds."""

        def watched() -> set[str]:
            return {one.resource for one in self.proxy.seen if one.is_watch and one.at >= self.operator.started}

        wait(lambda: watched() >= {"finetunejobs", "jobs"}, "the operator watches", 120)

    def quiet(self, seconds: float = 1.0) -> list[Seen]:
        """The writes (leases aside) that come although nothing happens for ``seconds``."""
        before = len(self.proxy.writes)
        time.sleep(seconds)
        return self.proxy.writes[before:]

    def settled(self) -> bool:
        """Whether nothing is written any more, also by an operator that died at its last write and has looked again."""
        if self.quiet(0.5) or not self.operator.alive:
            return False
        self.watching()
        return not self.quiet() and self.operator.alive


@dataclass(frozen=True)
class Outcome:
    """What one life left behind."""

    history: History
    writes: list[Seen]
    created: Counter[str]  # children by resource, as the API server answered 201
    events: Counter[str]
    faults: list[tuple[str, int]]  # each that was injected, and how often it struck
    starts: int  # of the operator
    killed: Seen | None  # the write at which it was
    seconds: float
    log: str


@contextmanager
def stage(server: RunningServer, folder: Path, **changes: Any) -> Iterator[Stage]:
    """A new namespace with an operator (not started yet) that sees nothing else; ``changes`` to its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"life-{uuid.uuid4().hex[:8]}"
    with Kube(server, namespace=name) as kube, Proxy(server) as proxy:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}})
        kubeconfig = server.write_kubeconfig(folder / "kubeconfig", url=proxy.url, namespace=name)
        operator = OperatorProcess(folder, kubeconfig, settings(name, **changes))
        kubelet = Kubelet(kube)
        try:
            with kubelet.running():
                yield Stage(kube, proxy, operator, kubelet)
        finally:
            operator.close()
            kube.delete("Namespace", name)


def live(server: RunningServer, folder: Path, name: str, disturb: Callable[[Stage], None] = lambda _: None) -> Outcome:
    """One life from creation to its end, with the operator restarted whenever it dies."""
    began = time.monotonic()
    with stage(server, folder) as there:
        disturb(there)
        there.operator.start(again=True)
        try:
            LIVES[name](Life(there.kube, there.kubelet))
            wait(there.settled, "nothing is written any more", 120)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{_what_was_seen(there)}") from error
        return Outcome(
            history=history_of(there.kube),
            writes=there.proxy.writes,
            created=Counter(one.resource for one in there.proxy.writes if one.code == 201 and one.resource != "events"),
            events=events_of(there.kube),
            faults=there.proxy.faults,
            starts=there.operator.starts,
            killed=there.proxy.killed,
            seconds=time.monotonic() - began,
            log=there.operator.log,
        )


def _what_was_seen(there: Stage) -> str:
    """The last requests and the last lines of the log, for a life that went no further."""
    now = time.monotonic()
    requests = [
        f"{one.at - now:8.2f} s  {one.method} {one.path}  {one.code} {one.fault}{' (watch)' if one.is_watch else ''}"
        for one in there.proxy.seen[-_LINES:]
    ]
    pods = [
        f"{pod['metadata']['name']} {pod['status'].get('phase')} on {pod['spec'].get('nodeName')}"
        for pod in there.kube.list("Pod")
    ]
    log = there.operator.log.splitlines()[-_LINES:]
    return "\n".join([f"Pods: {pods}; starts: {there.operator.starts}", "Requests:", *requests, "Log:", *log])


def told_once(log: str) -> list[str]:
    """Lines of the operator's log that report a defect."""
    return [line for line in log.splitlines() if re.search(r"Traceback|defect|never awaited", line)]
