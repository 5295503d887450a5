"""A FineTuneJob whose world a test moves by hand; every look is checked to be idempotent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.exits import ExitClass
from finetune_api.plan import Plan
from finetune_api.report import EndedAttempt, Heartbeat, Phase, Progress, Termination
from finetune_operator.derive import derive, dump
from finetune_operator.observe import JobView, Observed, PodView
from finetune_operator.settings import OperatorSettings
from finetune_operator.verdict import Verdict

START = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
SETTINGS = OperatorSettings.model_validate({"trainerImage": "trainer:1", "lease": {"enabled": False}})
URI = "s3://adapters/ns/bot/u/"


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def text(seconds: float) -> str:
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def plan(nodes: int = 2) -> Plan:
    return Plan.model_validate(
        {
            "worldSize": nodes,
            "nodes": nodes,
            "processesPerNode": 1,
            "device": "cpu",
            "strategy": {"type": "FSDP", "label": "FSDP full shard"},
            "method": "QLoRA",
            "precision": "FP32",
            "microBatchSize": 1,
            "gradientAccumulationSteps": 1,
            "globalBatchSize": nodes,
            "gradientCheckpointing": "None",
            "outputFormat": "Adapter",
            "artifactPrefix": URI,
            "checkpointPrefix": f"{URI}checkpoints/",
        }
    )


def job(**changes: Any) -> JobView:
    known: dict[str, Any] = {
        "name": "ftj-bot",
        "uid": "job-uid",
        "created": START,
        "suspended": False,
        "active_deadline_seconds": None,
        "config_map": "ftj-bot-00000000",
        "nodes": 2,
        "active": 2,
    }
    return JobView(**{**known, **changes})


def pod(index: int, letter: str = "a", **changes: Any) -> PodView:
    """A running pod; ``letter`` tells the pods of one index apart."""
    known: dict[str, Any] = {
        "name": f"ftj-bot-{index}-{letter * 5}",
        "uid": f"{letter * 4}{index:04d}-1111-2222-3333-444444444444",
        "index": index,
        "created": START,
        "phase": "Running",
        "node": f"n{index + 1}",
        "ready": True,
        "started": at(1),
        "image": "registry/trainer:1",
    }
    return PodView(**{**known, **changes})


def new_pod(index: int, letter: str = "a", **changes: Any) -> PodView:
    """A pod that nothing has started yet."""
    return pod(index, letter, **{"phase": "Pending", "ready": False, "started": None, "node": "", **changes})


def dead(living: PodView, seconds: float, code: int | None, said: Termination | None = None, **changes: Any) -> PodView:
    return replace(
        living, phase="Failed", ready=False, finished=at(seconds), exit_code=code, termination=said, **changes
    )


def said(exit_class: ExitClass, message: str, **more: Any) -> Termination:
    return Termination(exit_class=exit_class, exit_code=exit_class.code, message=message, **more)


def over(gang: str, exit_class: ExitClass, seconds: float, message: str = "", **more: Any) -> EndedAttempt:
    """An attempt that a launcher remembers."""
    known: dict[str, Any] = {"number": 1, "started_at": at(5).timestamp()}
    return EndedAttempt(
        gang=gang, exit_class=exit_class, ended_at=at(seconds).timestamp(), message=message, **{**known, **more}
    )


def page(node: int, gang: str = "g1", step: int = 0, phase: Phase = Phase.TRAINING, **more: Any) -> Progress:
    """What the launcher of ``node`` says; keys of Heartbeat go to its only rank."""
    beat = {name: more.pop(name) for name in list(more) if name in Heartbeat.model_fields and name != "rank"}
    ranks: tuple[Heartbeat, ...] = ()
    if gang:
        ranks = (Heartbeat(rank=node, local_rank=0, pid=9, phase=phase, step=step, **{"total_steps": 100, **beat}),)
    known: dict[str, Any] = {"attempt_started_at": at(5).timestamp() if gang else 0.0}
    return Progress(
        job={"namespace": "ns", "name": "bot", "uid": "u"},
        node_rank=node,
        pid=1,
        phase=phase,
        gang=gang,
        ranks=ranks,
        **{**known, **more},
    )


@dataclass
class Life:
    """The FineTuneJob as it stands, and everything that was told about it."""

    nodes: int = 2
    spec: dict[str, Any] = field(default_factory=dict)
    resource: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)  # "Reason: message" of every event

    def __post_init__(self) -> None:
        metadata = {"name": "bot", "namespace": "ns", "uid": "u", "generation": 1}
        self.resource = {"metadata": metadata, "spec": {"method": {"type": "QLoRA"}, **self.spec}}

    def observed(self, seconds: float, job: JobView | None, **more: Any) -> Observed:
        return Observed(resource=self.resource, now=at(seconds), job=job, **more)

    def look(
        self,
        seconds: float,
        job: JobView | None = None,
        pods: Sequence[PodView] | None = None,
        progress: Sequence[Progress] = (),
        complaints: Sequence[str] = (),
    ) -> Verdict:
        """One look, its status written; looking again changes nothing and tells nothing."""
        before = self.observed(
            seconds,
            job,
            pods=None if pods is None else tuple(pods),
            progress=tuple(progress),
            complaints=tuple(complaints),
        )
        verdict = derive(before, plan(self.nodes), SETTINGS)
        assert derive(before, plan(self.nodes), SETTINGS) == verdict
        self.resource = {**self.resource, "status": dump(verdict.status)}
        again = derive(replace(before, resource=self.resource), plan(self.nodes), SETTINGS)
        assert dump(again.status) == dump(verdict.status)
        assert again.events == ()
        self.told += [f"{event.reason}: {event.message}" for event in verdict.events]
        return verdict

    def run(self) -> Verdict:
        """Until the first page of progress."""
        self.look(0, job())
        self.look(2, job(ready=2))
        return self.look(10, job(ready=2), [pod(0), pod(1)], [page(0, step=3), page(1, step=3)])

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.resource["status"]
        return found

    def condition(self, kind: str) -> tuple[str, str, str]:
        """(status, reason, message)."""
        found = next(c for c in self.status["conditions"] if c["type"] == kind)
        return found["status"], found["reason"], found["message"]

    def attempts(self, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(entry.get(name) for name in names) for entry in self.status.get("attempts", ())]
