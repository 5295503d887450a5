"""Blocks of the spec that may change while a job is suspended: they reach its next pods, or are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.apiserver.kube import Kube
from tests.apiserver.life import NAME, Life, job
from tests.apiserver.manifests import manifest
from tests.apiserver.server import RunningServer, shared_server
from tests.apiserver.stage import Stage, stage

from finetune_api.status import FineTuneJobStatus

JOB = f"ftj-{NAME}"
CHANGES: dict[str, Any] = {
    "resources": {"requests": {"cpu": "3", "memory": "2Gi"}},
    "placement": {"nodeSelector": {"pool": "large"}},
    "checkpoint": {"everySteps": 7, "keep": 5},
}


@pytest.fixture
def there(job_server: RunningServer, tmp_path: Path) -> Iterator[Stage]:
    with stage(job_server, tmp_path) as running:
        running.operator.start()
        running.watching()
        yield running


def _trains(there: Stage) -> Life:
    life = Life(there.kube, there.kubelet)
    there.kubelet.page = lambda index: life.page(index)
    there.kubelet.last_words = life.interrupted("gang-1", 6)
    there.kube.create(job())
    life.until_pods_run()
    life.train("gang-1", 5)
    return life


def _suspend(kube: Kube, suspend: bool, **changes: Any) -> None:
    kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"suspend": suspend}, **changes}})


def _what_pods_get(there: Stage) -> dict[str, Any]:
    """By the newest Job, in the words of the spec."""
    found = there.kube.find("Job", JOB)
    if found is None:  # between the old one and the new one
        return {}
    pod = found["spec"]["template"]["spec"]
    name = next(volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
    checkpoint = json.loads(there.kube.get("ConfigMap", name)["data"]["trainer.json"])["spec"]["checkpoint"]
    return {
        "resources": {"requests": pod["containers"][0]["resources"].get("requests", {})},
        "placement": {"nodeSelector": pod.get("nodeSelector", {})},
        "checkpoint": {key: checkpoint[key] for key in ("everySteps", "keep")},
    }


def test_what_changes_while_a_job_is_suspended_reaches_the_pods_that_resume_it(there: Stage) -> None:
    life = _trains(there)
    _suspend(there.kube, True)
    life.until_state("Suspended")
    before = there.kube.get("Job", JOB)["metadata"]["uid"]
    there.kube.patch("FineTuneJob", NAME, {"spec": CHANGES})
    there.kube.wait(lambda: _what_pods_get(there) == CHANGES, "the Job is made anew", 60)
    there.kube.wait(lambda: not there.kube.list("Pod"), "no pod is left")
    made = there.kube.get("Job", JOB)
    assert (made["metadata"]["uid"] != before, made["spec"]["suspend"]) == (True, True)
    assert life.status.state == "Suspended"
    _suspend(there.kube, False)
    life.until_pods_run()
    life.train("gang-2", 8, resumed=6)
    attempts = [(attempt.number, attempt.cause, attempt.resumed_from_step) for attempt in life.status.attempts]
    assert attempts == [(1, "Suspended", 0), (2, None, 6)]
    life.complete("gang-2")
    assert there.kube.get("Job", JOB)["metadata"]["uid"] == made["metadata"]["uid"]


def test_a_change_together_with_the_suspension_waits_for_the_last_words_of_the_pods(there: Stage) -> None:
    life = _trains(there)
    there.kubelet.removes = False  # pods that have ended stay until they were heard
    _suspend(there.kube, True, **CHANGES)
    life.until("the last words", lambda status: status.attempts[0].last_step == 6)
    there.kubelet.removes = True
    there.kube.wait(lambda: _what_pods_get(there) == CHANGES, "the Job is made anew", 60)
    attempt = life.status.attempts[0]
    assert (attempt.cause, attempt.last_step) == ("Suspended", 6)
    life.until_state("Suspended")
    _suspend(there.kube, False)
    life.until_pods_run()
    life.train("gang-2", 8, resumed=6)
    life.complete("gang-2")


def test_pods_of_before_are_stopped_though_the_resume_came_before_anybody_looked(there: Stage) -> None:
    life = _trains(there)
    assert there.operator.stop() == 0
    _suspend(there.kube, True, **CHANGES)
    _suspend(there.kube, False)
    there.operator.start()
    there.kube.wait(lambda: _what_pods_get(there) == CHANGES, "the Job is made anew", 60)
    life.until_pods_run()
    life.train("gang-2", 8, resumed=6)
    assert [(attempt.number, attempt.cause) for attempt in life.status.attempts] == [(1, "Suspended"), (2, None)]
    life.complete("gang-2")


@pytest.mark.parametrize("block", CHANGES)
def test_a_change_that_no_pod_would_hear_of_is_refused_in_a_sentence(kube: Kube, block: str) -> None:
    path, kind = kube.path("FineTuneJob", "support-bot"), "application/merge-patch+json"
    kube.create(manifest())
    kube.patch("FineTuneJob", "support-bot", {"status": {"state": "Running"}}, subresource="status")
    answer = kube.call("PATCH", path, {"spec": {block: CHANGES[block]}}, content_type=kind)
    assert answer.code == 422
    words = (
        f"spec.{block} can change while the job is suspended only; set runPolicy.suspend: true, change it, then resume"
    )
    assert words in answer.body["message"]
    assert len(answer.body["details"]["causes"]) == 1
    change = {"runPolicy": {"suspend": True}, block: CHANGES[block]}
    assert kube.call("PATCH", path, {"spec": change}, content_type=kind).code == 200


@pytest.mark.parametrize("state", [None, "Invalid"])
def test_a_job_that_has_no_pods_may_be_mended_at_once(kube: Kube, state: str | None) -> None:
    kube.create(manifest())
    if state:
        kube.patch("FineTuneJob", "support-bot", {"status": {"state": state}}, subresource="status")
    for block, change in CHANGES.items():
        kube.patch("FineTuneJob", "support-bot", {"spec": {block: change}})
    spec = kube.get("FineTuneJob", "support-bot")["spec"]
    assert {block: spec[block] for block in CHANGES} == CHANGES


def test_a_job_that_a_later_version_started_is_looked_after_by_this_one_which_cannot_read_it(tmp_path: Path) -> None:
    """After a rollback: the CRD knows a field that this operator does not."""
    with (
        shared_server(tmp_path / "server", os.getpid(), controllers=True) as server,
        stage(server, tmp_path / "life") as there,
    ):
        crd, path = "finetunejobs.finetune.dev", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"
        schema = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/novelty"
        added = [{"op": "add", "path": schema, "value": {"type": "string"}}]
        assert there.kube.call("PATCH", path + crd, added, content_type="application/json-patch+json").code == 200
        there.operator.start()
        there.watching()
        life = _trains(there)
        there.kube.wait(lambda: _accepts_novelty(there.kube), "the API server serves the new field", 60)
        life.until("the refusal", lambda status: _accepted(status) == ("False", "InvalidSpec"))
        assert life.status.state == "Running"
        there.operator.kill()
        there.operator.start()
        life.train("gang-1", 6)
        assert _accepted(life.status) == ("False", "InvalidSpec")
        _suspend(there.kube, True)
        life.until_state("Suspended")
        _suspend(there.kube, False)
        life.until_pods_run()
        life.train("gang-2", 8, resumed=6)
        life.complete("gang-2")
        assert [(attempt.number, attempt.cause) for attempt in life.status.attempts] == [
            (1, "Suspended"),
            (2, "Completed"),
        ]


def _accepts_novelty(kube: Kube) -> bool:
    path, kind = kube.path("FineTuneJob", NAME), "application/merge-patch+json"
    answer = kube.call("PATCH", path, {"spec": {"novelty": "x"}}, content_type=kind)
    return "novelty" in answer.body.get("spec", {})


def _accepted(status: FineTuneJobStatus) -> tuple[str, str]:
    return next((found.status, found.reason) for found in status.conditions if found.type == "Accepted")
