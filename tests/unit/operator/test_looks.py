"""How often a job is looked at when nothing has happened to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.looks import seconds_too_early, seconds_until_next_look
from finetune_operator.observe import JobView
from finetune_operator.store import Traffic
from finetune_operator.workqueue import WorkQueue

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = JobView("ftj-a", "u", NOW - timedelta(seconds=4), False, None, "cm", 2, active=2, ready=2)


def _running(silent_seconds: float) -> dict[str, Any]:
    said = (NOW - timedelta(seconds=silent_seconds)).isoformat()
    status = {"state": "Running", "observedGeneration": 1, "progress": {"updatedAt": said}, "conditions": [{}]}
    return {"metadata": {"name": "a", "generation": 1}, "spec": {}, "status": status}


def test_few_jobs_are_looked_at_as_often_as_they_ask() -> None:
    assert seconds_until_next_look("Running", 10.0, Traffic(3, 0)) == 10.0
    assert seconds_too_early(_running(10), JOB, NOW, Traffic(3, 0)) == 0.0


def test_a_thousand_running_jobs_share_twenty_looks_a_second() -> None:
    assert seconds_until_next_look("Running", 10.0, Traffic(1000, 0)) == 50.0
    assert seconds_too_early(_running(40), JOB, NOW, Traffic(1000, 0)) == 10.0
    assert seconds_too_early(_running(70), JOB, NOW, Traffic(1000, 300)) == 10.0
    assert seconds_too_early(_running(10), JOB, NOW, Traffic(1000, 300)) == 15.0, "by then others may have ended"


def test_while_many_start_the_others_are_looked_at_a_fifth_as_often() -> None:
    assert seconds_too_early(_running(30), JOB, NOW, Traffic(160, 0)) == 0.0
    assert seconds_too_early(_running(30), JOB, NOW, Traffic(160, 0, rush=True)) == 10.0
    new: dict[str, Any] = {"metadata": {"name": "a", "generation": 1}, "spec": {}}
    assert seconds_too_early(new, replace(JOB, ready=0), NOW, Traffic(40, 40)) == 0.0
    young, old = (replace(JOB, ready=0, created=NOW - timedelta(seconds=age)) for age in (110, 120))
    assert seconds_too_early(new, young, NOW, Traffic(60, 60, rush=True)) == 10.0, "its turn will come"
    assert seconds_too_early(new, old, NOW, Traffic(60, 60, rush=True)) == 0.0, "but people want to know"


def test_a_running_job_to_which_something_has_happened_is_looked_at_now() -> None:
    assert seconds_too_early(_running(10), replace(JOB, ready=1), NOW, Traffic(1000, 300)) == 0.0
    assert seconds_too_early(_running(10), replace(JOB, complete=True), NOW, Traffic(1000, 300)) == 0.0
    changed = _running(10)
    changed["metadata"]["generation"] = 2
    assert seconds_too_early(changed, JOB, NOW, Traffic(1000, 300)) == 0.0


def test_a_new_job_may_start_in_silence_as_long_as_its_share_of_looks_allows() -> None:
    new: dict[str, Any] = {"metadata": {"name": "a", "generation": 1}, "spec": {}}
    assert seconds_too_early(new, replace(JOB, ready=0), NOW, Traffic(100, 100)) == 6.0
    assert seconds_too_early(new, replace(JOB, ready=0), NOW, Traffic(1, 1)) == 0.0
    assert seconds_too_early(new, None, NOW, Traffic(100, 100)) == 0.0, "its Job must be made"


def test_who_comes_first_goes_before_all_that_wait() -> None:
    async def order() -> list[str]:
        queue = WorkQueue()
        queue.add(("n", "waits"))
        queue.add(("n", "new"), first=True)
        return [(await queue.get())[1] for _ in range(2)]

    assert asyncio.run(order()) == ["new", "waits"]
