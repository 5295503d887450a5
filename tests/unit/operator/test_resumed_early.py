"""A job that is resumed while its pods are still leaving: they were suspended, not deleted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.job_life import URI, Life, at, dead, job, new_pod, over, page, pod, said, text

from finetune_api.exits import ExitClass
from finetune_api.report import Phase
from finetune_operator.observe import job_view

LEAVING = [replace(pod(n), deleted=at(140), asked_to_go=at(20)) for n in (0, 1)]
WORD = said(ExitClass.INTERRUPTED, "stopped", gang="g1", step=9, checkpoint_step=9, checkpoint_uri=f"{URI}c/9/")


def suspend(life: Life, asked: bool) -> None:
    life.resource["spec"] = {**life.resource["spec"], "runPolicy": {"suspend": asked}}


def suspending() -> Life:
    """A job that ran, and whose pods write a checkpoint."""
    life = Life()
    life.run()
    suspend(life, True)
    life.look(21, job(suspended=True, active=0, terminating=2), LEAVING, [page(0, step=8), page(1, step=8)])
    assert life.status["state"] == "Suspending"
    return life


@pytest.mark.parametrize("seen", ["leaving", "ended", "gone"])
def test_pods_that_leave_after_the_resume_were_suspended(seen: str) -> None:
    life = suspending()
    suspend(life, False)
    ended = [dead(one, 24, 143, WORD) for one in LEAVING]
    if seen == "leaving":
        life.look(22, job(active=0, terminating=2), LEAVING, [page(0, step=8), page(1, step=8)])
        life.look(23, job(active=0, terminating=2), LEAVING)
        life.look(25, job(active=0), ended)
    elif seen == "ended":
        life.look(25, job(active=0), ended)
    life.look(27, job(), [new_pod(n, "b", created=at(26)) for n in (0, 1)])
    new = [pod(n, "b", created=at(26), started=at(28)) for n in (0, 1)]
    life.look(40, job(ready=2), new, [page(n, "g2", 9, resumed_from_step=9) for n in (0, 1)])
    assert life.attempts("number", "cause", "lastStep") == [(1, "Suspended", 9), (2, None, None)]
    assert life.status["restarts"] == [{"cause": "Suspended", "count": 1}]
    told = [line.split(":")[0] for line in life.told if not line.startswith("Waiting")]
    assert told == ["Running", "Suspending", "Resumed", "Running"]


def test_launchers_that_say_interrupted_after_the_resume_were_suspended() -> None:
    life = suspending()
    suspend(life, False)
    stopped = over("g1", ExitClass.INTERRUPTED, 21, "rank 0 was asked to stop", last_step=9)
    life.look(22, job(active=0, terminating=2), LEAVING, [page(1, "", ended=(stopped,))])
    assert life.attempts("cause", "endedAt", "lastStep") == [("Suspended", text(21), 9)]


def test_a_suspension_that_asked_no_pod_to_go_ends_no_attempt() -> None:
    life = Life()
    life.run()
    suspend(life, True)
    life.look(21, job(suspended=True, ready=2), [pod(0), pod(1)], [page(0, step=8), page(1, step=8)])
    assert life.status["state"] == "Suspending"
    suspend(life, False)
    life.look(22, job(ready=2), [pod(0), pod(1)], [page(0, step=8), page(1, step=8)])
    assert (life.status["state"], life.attempts("endedAt")) == ("Running", [(None,)])


@pytest.mark.parametrize("words", [{"held": True}, {"resumed": at(22)}])
def test_the_job_itself_tells_of_a_suspension_that_no_look_saw(words: dict[str, Any]) -> None:
    life = Life()
    life.run()
    life.look(25, job(active=0, **words), [dead(one, 24, 143, WORD) for one in LEAVING])
    assert life.attempts("cause", "message") == [("Suspended", "stopped because the job was suspended")]


def test_a_pod_that_is_deleted_long_after_a_resume_was_not_suspended() -> None:
    life = Life()
    life.run()
    deleted = dead(replace(pod(0), deleted=at(900), asked_to_go=at(780)), 800, 143, WORD)
    life.look(801, job(ready=1, failed=1, resumed=at(5)), [deleted, pod(1)])
    assert life.attempts("cause") == [("PodDeleted",)]


def test_when_a_job_was_suspended_and_resumed_is_read_from_its_condition() -> None:
    def seen(status: str) -> tuple[bool, object]:
        condition = {"type": "Suspended", "status": status, "lastTransitionTime": text(7)}
        metadata = {"name": "ftj-bot", "uid": "j", "creationTimestamp": text(0)}
        spec: dict[str, Any] = {"template": {"spec": {}}}
        view = job_view({"metadata": metadata, "spec": spec, "status": {"conditions": [condition]}})
        return view.held, view.resumed

    assert seen("True") == (True, None)
    assert seen("False") == (False, at(7))


def test_a_resumed_job_whose_pods_are_ready_is_looked_at_again_soon_until_its_launchers_have_met() -> None:
    life = suspending()
    life.look(26, job(suspended=True, active=0), [])
    suspend(life, False)
    resumed = job(ready=2, resumed=at(30))
    new = [pod(n, "b", created=at(30), started=at(32)) for n in (0, 1)]
    said = []
    for seconds in (33, 35, 60, 600):
        verdict = life.look(seconds, resumed, new, [page(n, "", phase=Phase.FETCHING_MODEL) for n in (0, 1)])
        said.append((life.status["state"], life.status["message"], verdict.look_again_seconds))
    preparing = ("Starting", "fetching the model")
    assert said == [(*preparing, seconds) for seconds in (2.0, 2.0, 6.0, 10.0)]
    assert life.condition("PodsReady") == ("True", "Ready", "2 pods are ready")
    life.look(601, resumed, new, [page(n, "g2", 9, resumed_from_step=9) for n in (0, 1)])
    assert life.status["state"] == "Running"


def test_a_resumed_job_says_within_seconds_what_its_pods_wait_for() -> None:
    life = suspending()
    life.look(26, job(suspended=True, active=0), [])
    suspend(life, False)
    looks = [life.look(seconds, job(resumed=at(600)), [new_pod(0, "b", created=at(600))]) for seconds in (601, 604)]
    assert [verdict.look_again_seconds for verdict in looks] == [2.0, 10.0]
