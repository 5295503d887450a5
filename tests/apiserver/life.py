"""Whole lives of a FineTuneJob, driven from outside: the test is user, scheduler, kubelet and trainer at once.

Every step waits until the status says what the step was about, so a life goes on in the same way however often the
operator is killed in between; ``History`` is what must not depend on that.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.apiserver.kube import Document, Kube, wait
from tests.apiserver.kubelet import Kubelet, index_of
from tests.apiserver.manifests import manifest
from tests.apiserver.operator_process import parse_status

from finetune_api.exits import ExitClass
from finetune_api.report import EndedAttempt, Heartbeat, Phase, Progress, Termination
from finetune_api.status import FineTuneJobStatus

NAME = "life"
NODES = 2
STEPS = 20
SECONDS = 180.0  # for one step of a life, on a machine with all cores busy; the Job controller alone waits 10 s
ARTIFACT = "s3://adapters/team/artifacts/0123456789ab/"
BUCKET = "s3://adapters/team/checkpoints"


def job(**changes: Any) -> Document:
    blocks = {"training": {"maxSteps": STEPS}, "distributed": {"nodes": NODES}} | changes
    return manifest(name=NAME, **blocks)


@dataclass
class Life:
    """The world around one job. The story is told in :func:`whole_life` and its siblings."""

    kube: Kube
    kubelet: Kubelet
    began: float = field(default_factory=time.time)

    # ---- the trainer's words

    def page(self, index: int, *, gang: str = "", step: int = 0, resumed: int = 0, **fields: Any) -> Progress:
        """A launcher's page: ``gang`` trains at ``step``; without one it waits for its peers."""
        uid = self.kube.get("FineTuneJob", NAME)["metadata"]["uid"]
        ranks: tuple[Heartbeat, ...] = ()
        if gang:
            ranks = (
                Heartbeat(
                    rank=index,
                    local_rank=0,
                    pid=100,
                    phase=Phase.TRAINING,
                    step=step,
                    total_steps=STEPS,
                    epoch=step / STEPS,
                    loss=2.0 - step / 100,
                    learning_rate=1e-4,
                    tokens_total=step * 1000,
                    tokens_per_second=1000.0,
                    checkpoint_step=step - 1 if step else None,
                    checkpoint_uri=f"{BUCKET}/step-{step - 1:08d}/" if step else None,
                    resumed_from_step=resumed,
                    updated_at=self.began,
                ),
            )
        return Progress(
            job={"namespace": self.kube.namespace, "name": NAME, "uid": uid},
            node_rank=index,
            pid=1,
            phase=Phase.TRAINING if gang else Phase.RENDEZVOUS,
            gang=gang,
            ranks=ranks,
            started_at=self.began,
            **{"attempt": 1 if gang else 0, "attempt_started_at": self.began if gang else 0.0} | fields,
        )

    def train(self, gang: str, step: int, resumed: int = 0, **fields: Any) -> None:
        """Both launchers say that ``gang`` has reached ``step``; wait until the status says so too."""
        for index in range(NODES):
            self.kubelet.say(index, self.page(index, gang=gang, step=step, resumed=resumed, **fields))
        self.until(f"step {step} of {gang}", lambda s: s.progress is not None and s.progress.step == step)

    def interrupted(self, gang: str, step: int, resumed: int = 0) -> Callable[[int], Termination]:
        """The last words of launchers that are asked to stop."""
        return lambda index: Termination(
            exit_class=ExitClass.INTERRUPTED,
            exit_code=ExitClass.INTERRUPTED.code,
            message="stopped by SIGTERM after a checkpoint",
            step=step,
            checkpoint_step=step,
            checkpoint_uri=f"{BUCKET}/step-{step:08d}/",
            gang=gang,
            ended=(self.ended(gang, ExitClass.INTERRUPTED, step, resumed, number=1),),
        )

    def ended(self, gang: str, exit_class: ExitClass, step: int, resumed: int, *, number: int) -> EndedAttempt:
        return EndedAttempt(
            gang=gang,
            number=number,
            started_at=self.began,
            ended_at=time.time(),
            exit_class=exit_class,
            resumed_from_step=resumed,
            last_step=step,
            message=exit_class.meaning,
        )

    def complete(self, gang: str) -> None:
        """Both launchers exit with 0; the first one has published."""
        for index in reversed(range(NODES)):
            published: dict[str, Any] = {}
            if index == 0:
                published = {
                    "artifact_uri": ARTIFACT,
                    "artifact_manifest_sha256": "ab" * 32,
                    "artifact_files": 3,
                    "artifact_bytes": 4096,
                    "metrics": {"trainLoss": 1.8},
                }
            words = Termination(
                exit_class=ExitClass.COMPLETED,
                exit_code=0,
                message="training finished",
                step=STEPS,
                gang=gang,
                **published,
            )
            self.kubelet.end(index, words)
        self.until_state("Complete")

    # ---- the user's eyes

    @property
    def status(self) -> FineTuneJobStatus:
        return parse_status(self.kube.get("FineTuneJob", NAME))

    def until(self, what: str, question: Callable[[FineTuneJobStatus], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not question(self.status):
            if time.monotonic() > deadline:
                shown = self.status.model_dump_json(by_alias=True, exclude_none=True, indent=1)
                raise AssertionError(f"Waited {SECONDS:g} s in vain for {what}; the status is {shown}")
            time.sleep(0.1)

    def until_state(self, state: str) -> None:
        self.until(f"state {state}", lambda status: status.state == state)

    def until_attempts(self, total: int, *, ended: int) -> None:
        self.until(
            f"{total} attempts, {ended} of them ended",
            lambda status: status.total_attempts == total and sum(1 for a in status.attempts if a.ended_at) == ended,
        )

    def until_pods_run(self) -> None:
        wait(
            lambda: [p["status"]["phase"] for p in self.kubelet.pods()] == ["Running"] * NODES,
            f"{NODES} pods run",
            SECONDS,
            pause=0.2,  # often for the 10 s of the Job controller, and by many lives at a time
        )


# ---- the lives -------------------------------------------------------------------------------------------------------


def whole_life(life: Life) -> None:
    """Pending, running, one pod evicted, replaced, resumed, complete."""
    life.kubelet.schedules = False
    life.kubelet.page = lambda index: life.page(index)
    life.kube.create(job())
    life.until("the scheduler's reason", lambda status: "Insufficient cpu" in (status.message or ""))
    life.kubelet.schedules = True
    life.until_pods_run()
    life.train("gang-1", 5)
    life.until_attempts(1, ended=0)
    life.kubelet.evict(1, "The node was low on resource: memory.")
    over = life.ended("gang-1", ExitClass.COMMUNICATION_FAILED, 5, 0, number=1)
    life.kubelet.say(0, life.page(0, ended=(over,), restarts=1))
    life.until_attempts(1, ended=1)
    life.until_pods_run()
    life.train("gang-2", 8, resumed=4, attempt=2)
    life.until_attempts(2, ended=1)
    life.complete("gang-2")


def suspended_life(life: Life) -> None:
    """Running, suspended, changed meanwhile, resumed from the checkpoint, complete."""
    life.kubelet.page = lambda index: life.page(index)
    life.kube.create(job())
    life.until_pods_run()
    life.train("gang-1", 5)
    life.until_attempts(1, ended=0)
    life.kubelet.last_words = life.interrupted("gang-1", 6)
    # Pods vanish with their last words; who looks later knows less. Here they stay until they were heard.
    life.kubelet.removes = False
    life.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"suspend": True}}})
    life.until("the last words", lambda status: status.attempts[0].last_step == 6)
    life.kubelet.removes = True
    life.until_state("Suspended")
    wait(lambda: not life.kube.list("Pod"), "no pod is left", SECONDS, pause=0.2)
    life.until_attempts(1, ended=1)
    before = life.kube.get("Job", f"ftj-{NAME}")["metadata"]["uid"]
    life.kube.patch("FineTuneJob", NAME, {"spec": {"checkpoint": {"everySteps": 9}}})

    def made_anew() -> bool:
        found = life.kube.find("Job", f"ftj-{NAME}")
        return found is not None and found["metadata"]["uid"] != before

    wait(made_anew, "the Job is made anew", SECONDS, pause=0.2)
    life.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"suspend": False}}})
    life.until_pods_run()
    life.train("gang-2", 8, resumed=6)
    life.until_attempts(2, ended=1)
    life.complete("gang-2")


def mistaken_life(life: Life) -> None:
    """Running until the trainer finds a fault that only the user can mend."""
    life.kubelet.page = lambda index: life.page(index)
    life.kubelet.last_words = life.interrupted("gang-1", 4)  # nothing newer: it is not waited for
    life.kube.create(job())
    life.until_pods_run()
    life.train("gang-1", 5)
    life.until_attempts(1, ended=0)
    words = Termination(
        exit_class=ExitClass.INVALID_DATA,
        exit_code=ExitClass.INVALID_DATA.code,
        message="s3://data/train.jsonl line 7: the row has no field messages",
        hint="add it, or remove the line",
        step=5,
        gang="gang-1",
        ended=(life.ended("gang-1", ExitClass.INVALID_DATA, 5, 0, number=1),),
    )
    life.kubelet.end(0, words)
    life.until_state("Failed")


LIVES: dict[str, Callable[[Life], None]] = {
    "whole": whole_life,
    "suspended": suspended_life,
    "mistaken": mistaken_life,
}


# ---- what remains of a life ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """All that must not depend on when the operator died. Times, uids and random suffixes are blanked."""

    status: dict[str, Any]
    children: list[str]
    finalizers: list[str]


_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_POD = re.compile(rf"(ftj-{NAME}-\d+)-[a-z0-9]{{5}}\b")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in sorted(value.items())}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if isinstance(value, str):
        return _POD.sub(r"\1-*", _TIME.sub("<time>", value))
    return value


def history_of(kube: Kube) -> History:
    """Read when a life is over."""
    resource = kube.get("FineTuneJob", NAME)
    status = _plain(resource["status"])
    for attempt in status.get("attempts", []):
        if attempt.get("cause") == "Suspended":  # both pods end alike; either may be heard first
            attempt.pop("pod", None)
            attempt.pop("node", None)
        attempt.pop("pods", None)  # witnesses: how many were noticed in time depends on the moment of the looks
    children = [
        f"{kind} {item['metadata']['name']} of {item['metadata']['ownerReferences'][0]['kind']}"
        for kind in ("Job", "Service", "ConfigMap")
        for item in kube.list(kind)
        if item["metadata"]["name"] != "kube-root-ca.crt"
    ]
    return History(
        status=status,
        children=[re.sub(r"-[0-9a-f]{8} ", "-<digest> ", child) for child in children],
        finalizers=resource["metadata"].get("finalizers", []),
    )


def events_of(kube: Kube) -> Counter[str]:
    """How often each reason was told about the job."""
    told = [event for event in kube.list("Event") if event["involvedObject"]["kind"] == "FineTuneJob"]
    return Counter(event["reason"] for event in told)


def pods_by_index(kube: Kube) -> Counter[int]:
    return Counter(index_of(pod) for pod in kube.list("Pod"))
