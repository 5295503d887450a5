"""The work queue: requests melt, timers fire, nobody looks at one job twice at once."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from finetune_operator.main import end
from finetune_operator.workqueue import WorkQueue

A, B = ("default", "a"), ("default", "b")


async def _next(queue: WorkQueue, seconds: float = 20.0) -> tuple[str, str] | None:
    try:
        return await asyncio.wait_for(queue.get(), seconds)
    except TimeoutError:
        return None


def test_requests_for_one_job_melt_into_one() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        for _ in range(5):
            queue.add(A)
        assert queue.depth == 1
        assert await _next(queue) == A
        queue.done(A)
        assert await _next(queue, 0.05) is None

    asyncio.run(scenario())


def test_a_request_during_a_look_comes_after_it() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(A)
        assert await _next(queue) == A
        queue.add(A)
        assert await _next(queue, 0.05) is None, "the job is still being looked at"
        queue.done(A)
        assert await _next(queue) == A

    asyncio.run(scenario())


def test_the_earliest_due_time_wins_whatever_the_order() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        started = time.monotonic()
        queue.add(A, 30.0)
        queue.add(A, 0.05)
        queue.add(A, 60.0)
        assert await _next(queue) == A
        assert 0.04 <= time.monotonic() - started < 20
        queue.done(A)
        assert await _next(queue, 0.1) is None, "the later requests were for the same look"

    asyncio.run(scenario())


def test_a_delayed_request_does_not_hold_up_others() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(A, 30.0)
        waiting = asyncio.create_task(_next(queue))
        await asyncio.sleep(0.01)
        queue.add(B)
        assert await waiting == B
        assert queue.depth == 0, "a request that is not due is not waiting for a worker"

    asyncio.run(scenario())


def test_failures_in_a_row_wait_longer_and_longer_until_one_look_succeeds() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        delays = [queue.failed(A) for _ in range(10)]
        shares = [delay / base for delay, base in zip(delays, [0.2, 0.5, 1, 2, 4, 8, 15, 30, 30, 30], strict=True)]
        assert all(1 <= share <= 1.3 for share in shares), delays
        assert len(set(shares)) > 1, "those who failed together do not come back together"
        queue.succeeded(A)
        assert 0.2 <= queue.failed(A) <= 0.26
        assert 7.0 <= queue.failed(B, at_least_seconds=7.0) <= 9.1, "the server's own wish counts"

    asyncio.run(scenario())


def test_the_age_of_the_oldest_request_is_that_of_the_first_one_not_served() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(A)
        await asyncio.sleep(0.05)
        queue.add(A)
        queue.add(B, 10.0)
        assert 0.05 <= queue.oldest_seconds < 20
        await _next(queue)
        assert queue.oldest_seconds == 0.0

    asyncio.run(scenario())


def test_a_forgotten_job_is_not_looked_at() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        queue.add(A)
        queue.forget(A)
        assert await _next(queue, 0.05) is None

    asyncio.run(scenario())


def test_many_workers_serve_many_jobs_once_each() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        keys = [("default", f"job-{number}") for number in range(500)]
        served: list[tuple[str, str]] = []

        async def worker() -> None:
            while True:
                key = await queue.get()
                served.append(key)
                await asyncio.sleep(0)
                queue.done(key)

        workers = [asyncio.create_task(worker()) for _ in range(16)]
        for key in keys:
            queue.add(key)
        while len(served) < len(keys):
            await asyncio.sleep(0.01)
        for task in workers:
            task.cancel()
        assert sorted(served) == sorted(keys)

    asyncio.run(scenario())


@pytest.mark.parametrize("moments", range(5))
def test_a_worker_that_is_asked_to_end_as_a_job_comes_ends(moments: int) -> None:
    """`asyncio.wait_for` of Python 3.11 takes the job and forgets the cancellation."""

    async def scenario() -> None:
        queue = WorkQueue()

        async def work() -> None:
            while True:
                queue.done(await queue.get())

        queue.add(B, 3600.0)  # so that it waits for a limited time
        worker = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        queue.add(A)
        for _ in range(moments):
            await asyncio.sleep(0)
        worker.cancel()
        assert await asyncio.wait({worker}, timeout=5) == ({worker}, set())

    asyncio.run(scenario())


def test_what_loses_a_cancellation_is_cancelled_again() -> None:
    async def deaf() -> None:
        for _ in range(2):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
        await asyncio.sleep(3600)

    async def fails() -> None:
        raise ValueError

    async def scenario() -> None:
        tasks = {asyncio.create_task(deaf()), asyncio.create_task(fails())}
        await asyncio.sleep(0.01)
        await asyncio.wait_for(end(tasks), 60)
        assert all(task.done() for task in tasks)

    asyncio.run(scenario())
