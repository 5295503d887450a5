"""Children that the API server does not take, and children that are made again."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.job_life import Life, job

from finetune_operator.derive import derive_refused, dump
from finetune_operator.reconcile import pods_begin_anew

QUOTA = 'the API server refuses the Job ftj-bot: jobs.batch "ftj-bot" is forbidden: exceeded quota: small'


def test_a_refusal_stands_in_the_status_and_is_told_once() -> None:
    life = Life()
    first = derive_refused(life.observed(1, None), QUOTA)
    life.resource["status"] = dump(first.status)
    assert (first.status.state, first.status.message) == ("Pending", QUOTA)
    assert [(event.reason, event.message) for event in first.events] == [("Waiting", QUOTA)]
    assert life.condition("PodsReady") == ("False", "ChildRefused", QUOTA)
    assert life.condition("Accepted")[0] == "True"
    again = derive_refused(life.observed(9, None), QUOTA)
    assert (dump(again.status), again.events) == (life.resource["status"], ())
    life.look(20, job(created=life.observed(19, None).now))
    assert life.status["message"] == "waiting for 2 pods to start"
    assert life.condition("PodsReady") == ("False", "PodsStarting", "waiting for 2 pods to start")


@pytest.mark.parametrize(
    ("status", "suspended", "expected"),
    [
        ({}, False, None),
        ({"state": "Running", "totalAttempts": 1}, False, None),
        ({"state": "Restarting", "totalAttempts": 1}, False, "Restarting after attempt 1"),
        ({"state": "Suspended", "totalAttempts": 2}, True, "resumed after attempt 2"),
        (
            {"state": "Pending", "conditions": [{"type": "PodsReady", "reason": "VolumeNotReady"}]},
            False,
            "Pending after attempt 0 without a volume",
        ),
    ],
)
def test_pods_begin_anew_once_per_attempt(status: dict[str, Any], suspended: bool, expected: str | None) -> None:
    assert pods_begin_anew({"spec": {}, "status": status}, job(suspended=suspended)) == expected
