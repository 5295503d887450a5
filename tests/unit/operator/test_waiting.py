"""What a job waits for, word for word."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.job_life import Life, at, dead, job, new_pod, pod

FULL = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. preemption: 0/2 nodes are available."
QUOTA = 'Error creating: pods "ftj-bot-0-x" is forbidden: exceeded quota: team, requested: cpu=32, limited: cpu=8'
SECURITY = 'Error creating: pods "ftj-bot-0-x" is forbidden: violates PodSecurity "restricted:latest": privileged'
PULL = ("ImagePullBackOff", 'Back-off pulling image "registry/trainer:1"')


@pytest.mark.parametrize(
    ("pods", "complaints", "reason", "message"),
    [
        ([], [], "NoPods", "the Job ftj-bot has no pods yet"),
        ([], ["node is on fire"], "NoPods", "the Job ftj-bot has no pods yet (node is on fire)"),
        ([], [QUOTA], "QuotaExceeded", f"the namespace's quota does not allow the pods: {QUOTA}"),
        ([], [SECURITY], "PodsRefused", f"the API server refuses the pods: {SECURITY}"),
        (
            [new_pod(0, unschedulable=FULL), new_pod(1, unschedulable=FULL)],
            [],
            "Unschedulable",
            f"pod ftj-bot-0-aaaaa (and 1 more pod) is not scheduled: {FULL[:-1]}",
        ),
        (
            [pod(0), new_pod(1, unschedulable=FULL)],
            [],
            "Unschedulable",
            f"pod ftj-bot-1-aaaaa is not scheduled: {FULL[:-1]}",
        ),
        (
            [new_pod(0, node="n1", waiting=PULL), new_pod(1, node="n2")],
            [],
            "ImagePullError",
            "pod ftj-bot-0-aaaaa cannot pull image registry/trainer:1"
            ' (ImagePullBackOff: Back-off pulling image "registry/trainer:1")',
        ),
        (
            [new_pod(0, node="n1", waiting=("CreateContainerConfigError", 'secret "bucket" not found')), new_pod(1)],
            [],
            "CreateContainerConfigError",
            'pod ftj-bot-0-aaaaa cannot start: secret "bucket" not found',
        ),
        (
            [new_pod(0, unschedulable='persistentvolumeclaim "models" not found'), new_pod(1)],
            [],
            "Unschedulable",
            'pod ftj-bot-0-aaaaa is not scheduled: persistentvolumeclaim "models" not found',
        ),
        (
            [new_pod(0, node="n1"), new_pod(1, node="n2")],
            ["MountVolume.SetUp failed for volume \"config\" : configmap \"x\" not found"],
            "VolumeNotReady",
            'a volume is not ready: MountVolume.SetUp failed for volume "config" : configmap "x" not found',
        ),
        (
            [new_pod(0, node="n1", waiting=("ContainerCreating", "")), pod(1)],
            [],
            "ContainerCreating",
            "node n1 prepares the container of ftj-bot-0-aaaaa",
        ),
        ([pod(0, ready=False), pod(1)], [], "PodsStarting", "waiting for ftj-bot-0-aaaaa to be ready"),
        ([pod(0)], [], "PodsMissing", "the Job ftj-bot has not made 1 pod yet"),
        (
            [pod(0)],
            ["node is on fire"],
            "PodsMissing",
            "the Job ftj-bot has not made 1 pod yet (node is on fire)",
        ),
        (
            [pod(0), pod(1, deleted=at(100))],
            [],
            "PodsTerminating",
            "ftj-bot-1-aaaaa is still ending; the Job replaces it afterwards",
        ),
    ],
)  # fmt: skip
def test_the_message_says_what_is_waited_for(pods: list[Any], complaints: list[str], reason: str, message: str) -> None:
    life = Life()
    life.look(0, job())
    verdict = life.look(4, job(ready=1 if any(p.ready for p in pods) else 0), pods, complaints=complaints)
    assert life.status["message"] == message
    assert life.condition("PodsReady") == ("False", reason, message)
    assert life.status["state"] == ("Starting" if any(p.started for p in pods) else "Pending")
    assert verdict.look_again_seconds == 10.0


def test_waiting_becomes_an_event_after_three_seconds_and_once_per_reason() -> None:
    life = Life()
    life.look(0, job())
    stuck = [new_pod(0, unschedulable=FULL), new_pod(1, unschedulable=FULL)]
    life.look(2, job(), stuck)
    assert life.told == []
    life = Life()
    life.look(0, job())
    life.look(4, job(), stuck)
    life.look(14, job(), [new_pod(0, unschedulable=FULL), new_pod(1)])
    life.look(24, job(), [new_pod(0, node="n1", waiting=("ErrImagePull", "not found")), new_pod(1)])
    life.look(34, job(), [new_pod(0, node="n1", waiting=PULL), new_pod(1)])
    assert life.told == [
        f"Waiting: pod ftj-bot-0-aaaaa (and 1 more pod) is not scheduled: {FULL[:-1]}",
        "Waiting: pod ftj-bot-0-aaaaa cannot pull image registry/trainer:1 (ErrImagePull: not found)",
    ]


def test_a_look_without_pods_does_not_forget_what_is_waited_for() -> None:
    life = Life()
    life.look(0, job())
    life.look(4, job(), [new_pod(0, unschedulable=FULL), new_pod(1)])
    before = life.status
    life.look(5, job())
    assert life.status == before
    assert life.condition("PodsReady")[1] == "Unschedulable"


@pytest.mark.parametrize(
    ("complaint", "reason", "message"),
    [
        (QUOTA, "QuotaExceeded", f"the namespace's quota does not allow the pods: {QUOTA}"),
        (SECURITY, "PodsRefused", f"the API server refuses the pods: {SECURITY}"),
        ("node is on fire", "PodsMissing", "the Job ftj-bot has not made 1 pod yet (node is on fire)"),
    ],
)
def test_why_a_dead_pod_is_not_replaced_is_told(complaint: str, reason: str, message: str) -> None:
    life = Life()
    life.run()
    gone = dead(pod(1), 20, 137)
    life.look(21, job(ready=1, failed=1), [pod(0), gone])
    life.look(30, job(ready=1, failed=1), [pod(0), gone], complaints=[complaint])
    assert life.condition("PodsReady") == ("False", reason, message)
    assert life.status["message"].endswith(f"; now: {message}")
    if reason != "PodsMissing":
        assert life.told[-1] == f"Waiting: {message}"


def test_a_quota_that_refuses_nothing_any_more_is_not_told() -> None:
    life = Life()
    life.run()
    gone, new = dead(pod(1), 20, 137), new_pod(1, "b", created=at(25), node="n2")
    life.look(30, job(ready=1, failed=1), [pod(0), gone, new], complaints=[QUOTA])
    assert life.condition("PodsReady")[1] == "ContainerCreating"
