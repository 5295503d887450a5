"""What is read from pods, launchers and statuses, also from those of another version."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.job_life import URI, Life, at, dead, job, new_pod, over, page, plan, pod, said, text

from finetune_api.exits import ExitClass
from finetune_operator import observe
from finetune_operator.observe import NO_INDEX, parse_progress, parse_termination, pod_view
from finetune_operator.situation import status_before


@pytest.fixture(autouse=True)
def _nothing_told_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_told", set())


def kubernetes_pod(terminated: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    """As the API server has it, a sidecar first."""
    known: dict[str, Any] = {
        "name": "ftj-bot-1-abcde",
        "uid": "p1",
        "creationTimestamp": text(0),
        "labels": {"batch.kubernetes.io/job-completion-index": "1"},
    }
    trainer = {"name": "trainer", "image": "trainer:1", "resources": {"limits": {"memory": "512Mi"}}}
    proxy = {"name": "proxy", "image": "proxy:1", "resources": {"limits": {"memory": "64Mi"}}}
    state = {"terminated": {"exitCode": 1, **terminated}} if terminated is not None else {"running": {}}
    return {
        "metadata": {**known, **metadata},
        "spec": {"containers": [proxy, trainer]},
        "status": {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}]},
    }


def of_tomorrow(value: Any) -> Any:
    """The same with a field more in every object."""
    if isinstance(value, dict):
        return {**{name: of_tomorrow(entry) for name, entry in value.items()}, "novelty": {"mood": "good"}}
    return [of_tomorrow(entry) for entry in value] if isinstance(value, list) else value


def test_the_limit_and_the_image_are_those_of_the_training_container() -> None:
    seen = pod_view(kubernetes_pod())
    assert (seen.memory_limit, seen.image) == ("512Mi", "trainer:1")


def test_when_a_pod_was_asked_to_go_is_its_deadline_less_its_grace() -> None:
    seen = pod_view(kubernetes_pod(deletionTimestamp=text(140), deletionGracePeriodSeconds=120))
    assert (seen.deleted, seen.asked_to_go) == (at(140), at(20))
    assert pod_view(kubernetes_pod()).asked_to_go is None


def test_a_pod_that_no_kubelet_has_admitted_failed_when_it_last_changed() -> None:
    rejected = kubernetes_pod()
    rejected["status"] = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Pod was rejected: no"}
    assert pod_view(rejected).failed == at(0)
    rejected["status"]["startTime"] = text(3)
    assert pod_view(rejected).failed == at(3)
    scheduled, ready = ({"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready"))
    rejected["status"]["conditions"] = [
        {**ready, "lastTransitionTime": text(8)},
        {**scheduled, "lastTransitionTime": text(2)},
    ]
    assert pod_view(rejected).failed == at(8)
    rejected["status"]["phase"] = "Running"
    assert pod_view(rejected).failed is None


@pytest.mark.parametrize("name", ["bot-debugger", "bot-0-abcde"])
@pytest.mark.parametrize("labels", [{}, {"batch.kubernetes.io/job-completion-index": "x"}])
def test_a_pod_without_an_index_is_no_rank(name: str, labels: dict[str, str]) -> None:
    assert pod_view(kubernetes_pod(name=name, labels=labels)).index == NO_INDEX


def test_the_index_may_also_be_an_annotation() -> None:
    assert pod_view(kubernetes_pod(labels={}, annotations={observe.INDEX_LABEL: "3"})).index == 3


def test_a_pod_that_is_no_rank_changes_nothing() -> None:
    life = Life()
    life.run()
    before = life.status
    stranger = replace(dead(pod(0, "z"), 12, 1), index=NO_INDEX)
    lost = replace(pod(1, "y"), index=NO_INDEX, deleted=at(-100))
    verdict = life.look(13, job(ready=2), [pod(0), pod(1), stranger, lost], [page(0, step=3), page(1, step=3)])
    assert (life.status, verdict.commands) == (before, ())
    waiting = Life()
    waiting.look(0, job())
    waiting.look(4, job(), [new_pod(0, node="n1"), stranger])
    assert waiting.condition("PodsReady")[2] == "the Job ftj-bot has not made 1 pod yet"


def test_unknown_fields_of_a_last_word_are_ignored_at_every_depth() -> None:
    word = said(ExitClass.INVALID_DATA, "line 3", ended=(over("g1", ExitClass.INVALID_DATA, 9, "line 3"),), plan=plan())
    told = of_tomorrow(word.model_dump(mode="json", by_alias=True, exclude={"metrics"}))
    assert parse_termination(json.dumps(told)) == (word, "")
    assert pod_view(kubernetes_pod({"message": json.dumps(told)})).termination == word


def test_unknown_fields_of_a_page_of_progress_are_ignored_at_every_depth() -> None:
    ours = page(0, step=7, ended=(over("g0", ExitClass.RANK_KILLED, 9),))
    told = ours.model_dump(mode="json", by_alias=True)
    told = {**of_tomorrow(told), "job": told["job"]}
    assert parse_progress(json.dumps(told), Life().resource) == ours
    assert parse_progress(json.dumps(told).encode()) == ours


def test_what_cannot_be_read_is_noted_once_per_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    life = Life()
    future = {**page(0).model_dump(mode="json", by_alias=True), "schemaVersion": 2}
    for _ in range(3):
        assert parse_progress(json.dumps(future), life.resource) is None
    assert [record.getMessage() for record in caplog.records] == [
        "a launcher's page of progress cannot be read: schemaVersion: Input should be 1"
    ]
    assert (caplog.records[0].__dict__["namespace"], caplog.records[0].__dict__["uid"]) == ("ns", "u")


def test_a_last_word_that_cannot_be_read_is_told_and_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    seen = pod_view(kubernetes_pod({"message": 'exec: "python": executable file not found in $PATH\n'}))
    assert (seen.termination, seen.unread) == (None, 'exec: "python": executable file not found in $PATH')
    life = Life()
    life.run()
    pods = [pod(0), dead(pod(1), 20, 127, unread=seen.unread)]
    for seconds in (21, 26, 31):
        life.look(seconds, job(ready=1, failed=1), pods)
    assert [record.getMessage() for record in caplog.records] == [
        f"the last word of a pod cannot be read: {pods[1].name}: {seen.unread}"
    ]
    assert life.attempts("message") == [
        (f"pod {pods[1].name} exited with code 127 with a last word that cannot be read: {seen.unread}",)
    ]


def test_a_page_that_is_no_page_is_not_read() -> None:
    assert parse_progress(b"<html>\xff") is None
    assert parse_progress("[]") is None


def test_the_ledger_and_the_budgets_of_another_version_stay(caplog: pytest.LogCaptureFixture) -> None:
    life = Life()
    life.run()
    life.look(21, job(ready=1, failed=1), [pod(0), dead(pod(1), 20, 137)])
    known = status_before(life.resource)
    life.resource["status"] = of_tomorrow(life.status)
    assert status_before(life.resource) == known
    assert [(row.cause, row.count) for row in known.restarts] == [("RankKilled", 1)]
    assert caplog.records == []


def test_a_part_of_a_status_that_cannot_be_read_is_left_out_and_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    life = Life()
    life.run()
    life.resource["status"] = {**life.status, "attempts": [*life.status["attempts"], {"number": "x"}]}
    for _ in range(3):
        assert [attempt.number for attempt in status_before(life.resource).attempts] == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "a part of the status cannot be read and is left out: attempts.1.number"
    ]


def test_the_log_remembers_a_bounded_number_of_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_MATTERS_REMEMBERED", 2)
    for number in range(5):
        resource = {"metadata": {"namespace": "ns", "name": "bot", "uid": str(number)}}
        observe.warn_once(resource, "a matter", URI)
    assert len(observe._told) <= 2
