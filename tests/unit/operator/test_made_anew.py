"""When a Job is made anew because its spec has changed, and when not."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.job_life import Life, job

from finetune_operator.build import pods_digest
from finetune_operator.derive import derive_refused
from finetune_operator.observe import JobView
from finetune_operator.reconcile import is_outdated, is_to_be_made_anew

SPEC: dict[str, Any] = {"checkpoint": {"keep": 2}}
CHANGED: dict[str, Any] = {"checkpoint": {"keep": 9}}


def _resource(spec: dict[str, Any], generation: int = 2, state: str = "Suspended") -> dict[str, Any]:
    return {"metadata": {"name": "bot", "generation": generation}, "spec": spec, "status": {"state": state}}


def _job(**changes: Any) -> JobView:
    made = {"active": 0, "suspended": True, "pods_digest": pods_digest(SPEC), "pods_generation": 1}
    return job(**{**made, **changes})


def test_a_suspended_job_whose_blocks_have_changed_is_made_anew() -> None:
    assert is_to_be_made_anew(_resource(CHANGED), _job())
    assert not is_to_be_made_anew(_resource(SPEC), _job()), "nothing changed but the generation"


def test_what_an_older_crd_no_longer_shows_restarts_nothing() -> None:
    assert not is_outdated(_resource({}, generation=1), _job(suspended=False, active=2))
    assert is_outdated(_resource(CHANGED), _job(suspended=False, active=2))


@pytest.mark.parametrize(
    "known",
    [
        _job(complete=True),
        _job(failure=("DeadlineExceeded", "")),
        _job(active=1),
        _job(terminating=1),
        _job(deleting=True),
        _job(suspended=False),
        _job(pods_digest=None),
    ],
    ids=["complete", "failed", "active", "terminating", "deleting", "running", "of an earlier version"],
)
def test_a_job_that_has_something_left_to_say_stays(known: JobView) -> None:
    assert not is_to_be_made_anew(_resource(CHANGED), known)


@pytest.mark.parametrize("state", ["Running", "Suspending", "Publishing", ""])
def test_nothing_is_deleted_before_the_status_says_how_the_pods_ended(state: str) -> None:
    assert not is_to_be_made_anew(_resource(CHANGED, state=state), _job())


def test_a_suspended_job_whose_new_job_is_refused_stays_suspended() -> None:
    life = Life(spec={"runPolicy": {"suspend": True}})
    life.look(0, job(suspended=True, active=0), [])
    assert life.status["state"] == "Suspended"
    refused = derive_refused(life.observed(1, None), "the API server refuses the Job: quota").status
    assert (refused.state, refused.message) == ("Suspended", "the API server refuses the Job: quota")
    assert {known.type: known.status for known in refused.conditions}["Suspended"] == "True"


def test_a_resumed_job_whose_new_job_is_refused_is_not_suspended() -> None:
    life = Life(spec={"runPolicy": {"suspend": True}})
    life.look(0, job(suspended=True, active=0), [])
    life.resource["spec"]["runPolicy"] = {"suspend": False}
    refused = derive_refused(life.observed(1, None), "the API server refuses the Job: quota").status
    assert refused.state == "Pending"
    assert {known.type: known.status for known in refused.conditions}["Suspended"] == "False"
