"""What the logs say of pods that have no output."""

from __future__ import annotations

from typing import Any, cast

import pytest
from kubernetes import client
from tests.unit.client.jobs import NOW, failed, make_job, running

from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError
from finetune.cluster.job import Job
from finetune.cluster.logs import Reader, print_logs

EVICTED = "pod ftj-bot-0-aaaaa ended before its container started: Evicted: The node was low on memory."


class Known:
    """As much of a cluster as is asked for: one job and its pods."""

    def __init__(self, job: Job, *pods: client.V1Pod) -> None:
        self._job, self._pods = job, pods

    def job(self, _name: str) -> Job:
        return self._job

    def pods(self, _job: Job) -> tuple[client.V1Pod, ...]:
        return self._pods


def evicted() -> client.V1Pod:
    labels = {"batch.kubernetes.io/job-completion-index": "0"}
    return client.V1Pod(
        metadata=client.V1ObjectMeta(name="ftj-bot-0-aaaaa", uid="1", labels=labels, creation_timestamp=NOW),
        spec=client.V1PodSpec(containers=[]),
        status=client.V1PodStatus(phase="Failed", reason="Evicted", message="The node was low on memory."),
    )


def told(job: Job, *pods: client.V1Pod, **asked: Any) -> list[str]:
    said: list[str] = []
    cluster = cast(Cluster, Known(job, *pods))
    try:
        print_logs(cluster, "bot", 0, Reader(write=pytest.fail, say=said.append, **asked))
    except ClusterError as error:
        said.append(str(error))
    return said


def test_a_pod_that_never_started_is_named_and_not_called_gone() -> None:
    assert told(make_job(failed()), evicted()) == [
        EVICTED,
        "the FineTuneJob 'bot' is Failed: train.jsonl:7 is not a conversation",
    ]


def test_a_pod_that_never_started_is_named_where_nothing_is_followed_too() -> None:
    assert told(make_job(failed()), evicted(), follow=False) == [
        EVICTED,
        "the FineTuneJob 'bot' has no output; it is Failed",
    ]
    assert told(make_job(running()), evicted(), follow=False)[0] == EVICTED


def test_pods_that_nobody_has_any_more_are_gone() -> None:
    gone = "; its pods are gone and their output with them"
    assert told(make_job(failed())) == [
        f"the FineTuneJob 'bot' is Failed: train.jsonl:7 is not a conversation{gone}",
    ]
    assert told(make_job(failed()), follow=False) == [
        f"the FineTuneJob 'bot' has no output; it is Failed{gone}",
    ]
