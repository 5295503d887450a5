"""The measurements. Each takes a plane, loads it, and returns plain numbers."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from bench.scale.client import Bare, Post, Seen, each
from bench.scale.operator_process import SETTINGS, OperatorProcess, tally
from bench.scale.plane import Plane
from bench.scale.workload import FINETUNEJOBS, JOBS, NODES_PER_JOB, PODS, children, finetunejob, manifest
from finetune_operator.kube import CONNECTIONS
from finetune_operator.settings import OperatorSettings

_PATIENCE_SECONDS = 170
Say = Callable[[str], None]


@dataclass(frozen=True)
class Rollout:
    """``jobs`` jobs from the first request of the client until every pod runs."""

    jobs: int
    created_seconds: float  # until the client's last object existed
    seconds: float  # until all pods ran
    burst: Burst | None  # None without an operator
    cpu_seconds: dict[str, float]  # by process, until all pods ran
    load: float  # of the machine at the beginning, one minute


@dataclass(frozen=True)
class Burst:
    """From "the client's FineTuneJob exists" to "its Job exists"."""

    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True)
class Cost:
    """What the operator needed for a rollout."""

    requests: dict[str, int] = field(default_factory=dict)  # until every status said Running, leases left out
    requests_per_job: float = 0.0
    running_seconds: float = 0.0  # until every status said Running
    resident_bytes: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Idle:
    """A stretch of time in which nothing happens."""

    jobs: int
    seconds: float
    cpu_seconds: float
    requests: dict[str, int]
    requests_per_second: float
    writes: int  # other than to the lease
    resident_bytes: int
    peak_bytes: int
    ready_seconds: float = 0.0  # from the start of the process until it leads and watches


@dataclass(frozen=True)
class Restart:
    """SIGTERM, then a new process and a new job at the same moment."""

    live_jobs: int
    stop_seconds: float
    ready_seconds: float
    served_seconds: float  # from the start of the process until the new job's Job exists
    requests: dict[str, int]
    writes_to_old_jobs: int  # and to their children, within the next seconds; pages of progress are not counted


async def floor(plane: Plane, namespace: str, jobs: int) -> Rollout:
    """The bare client makes the Services and Jobs itself."""
    plane.make_namespace(namespace)
    settings = OperatorSettings.model_validate(SETTINGS)
    groups = [children(namespace, number, settings)[1:] for number in range(jobs)]
    return await _rollout(plane, namespace, groups, None)


async def burst_floor(plane: Plane, namespace: str, jobs: int) -> Burst:
    """The bare client makes FineTuneJobs, and of each that exists at once the children, over as many connections as the
    operator has: what is left when an operator needs no time at all to hear of a job, to plan it and to build."""
    plane.make_namespace(namespace)
    settings = OperatorSettings.model_validate(SETTINGS)
    orders = [(finetunejob(namespace, number), *children(namespace, number, settings)) for number in range(jobs)]
    connections = asyncio.Semaphore(CONNECTIONS)
    async with Bare(plane.server) as bare, bare.watching(JOBS.format(namespace)) as seen, asyncio.TaskGroup() as group:

        async def serve(posts: Sequence[Post]) -> None:
            async with connections:
                for post in posts:
                    await bare.send(post)

        async def create(posts: Sequence[Post]) -> float:
            await bare.send(posts[0])
            group.create_task(serve(posts[1:]))
            return time.monotonic()

        created = await each([lambda posts=posts: create(posts) for posts in orders])
        await seen.wait_for(jobs, _PATIENCE_SECONDS, "Jobs")
    return _burst(_delays(namespace, created, seen))


async def rollout(plane: Plane, operator: OperatorProcess, namespace: str, jobs: int) -> tuple[Rollout, Cost]:
    """The bare client makes FineTuneJobs, and the operator the rest."""
    plane.make_namespace(namespace)
    begun = _now()
    started = time.monotonic()
    result = await _rollout(plane, namespace, [(finetunejob(namespace, n),) for n in range(jobs)], operator)
    async with Bare(plane.server) as bare:
        while set(await _states(bare, namespace)) != {"Running"}:
            operator.check()
            if time.monotonic() - started > _PATIENCE_SECONDS:
                raise TimeoutError(f"States after {_PATIENCE_SECONDS} s: {await _states(bare, namespace)}.")
            await asyncio.sleep(0.25)
    seconds = time.monotonic() - started
    until = _now()
    await asyncio.sleep(1)  # the audit log is written behind
    requests = tally(one for one in operator.requests(begun, until) if not one.is_lease)
    resident, peak = operator.memory()
    return result, Cost(requests, sum(requests.values()) / jobs, seconds, resident, peak)


async def idle(operator: OperatorProcess, jobs: int, seconds: float, ready: float = 0.0) -> Idle:
    """Watch the operator do nothing."""
    begun, cpu = _now(), operator.cpu_seconds()
    await asyncio.sleep(seconds)
    spent, until = operator.cpu_seconds() - cpu, _now()
    await asyncio.sleep(1)
    found = list(operator.requests(begun, until))
    resident, peak = operator.memory()
    return Idle(
        jobs,
        seconds,
        spent,
        tally(iter(found)),
        len(found) / seconds,
        sum(one.writes and not one.is_lease for one in found),
        resident,
        peak,
        ready,
    )


async def settled(plane: Plane, namespaces: Sequence[str]) -> None:
    """Until every status holds a page of progress: from then on nothing is new, the fake trainers stand still."""
    async with Bare(plane.server) as bare:
        for namespace in namespaces:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not all("progress" in one for one in await _statuses(bare, namespace)):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Not every job in {namespace} shows progress after {_PATIENCE_SECONDS} s.")
                await asyncio.sleep(2)


async def restart(plane: Plane, operator: OperatorProcess, namespace: str, live: int, settle_seconds: float) -> Restart:
    """How long nobody serves, and whether anything is written that was right already."""
    stopped = operator.stop()
    name = "after-restart-00000"
    async with Bare(plane.server) as bare, bare.watching(JOBS.format(namespace)) as seen:
        begun = _now()
        operator.start()
        await bare.send(finetunejob(namespace, 0, "after-restart"))
        waiting = asyncio.create_task(seen.wait_for(1, 60, "Jobs"))
        ready = await asyncio.to_thread(operator.wait_ready)
        served = await waiting - operator.started
        await asyncio.sleep(settle_seconds)
    found = [one for one in operator.requests(begun) if not one.is_lease]
    old = [one for one in found if one.writes and name not in one.name and not one.is_progress]
    return Restart(live, stopped, ready, served, tally(iter(found)), len(old))


async def finish_jobs(plane: Plane, namespace: str, jobs: int, status: dict[str, Any]) -> None:
    """``jobs`` FineTuneJobs that have ended: created, then given ``status`` as an operator wrote it."""
    plane.make_namespace(namespace)

    async with Bare(plane.server) as bare:

        async def finish(number: int) -> None:
            await bare.send(finetunejob(namespace, number))
            name = manifest(namespace, number)["metadata"]["name"]
            post = Post.of(f"{FINETUNEJOBS.format(namespace)}/{name}/status", {"status": status})
            await bare.send(post, "PATCH", "application/merge-patch+json")

        await each([lambda n=number: finish(n) for number in range(jobs)])


async def status_of(plane: Plane, namespace: str, number: int = 0) -> dict[str, Any]:
    """The status of one job."""
    name = manifest(namespace, number)["metadata"]["name"]
    async with Bare(plane.server) as bare:
        return dict((await bare.get(f"{FINETUNEJOBS.format(namespace)}/{name}")).get("status", {}))


async def _rollout(
    plane: Plane, namespace: str, groups: Sequence[Sequence[Post]], operator: OperatorProcess | None
) -> Rollout:
    load = os.getloadavg()[0]
    async with AsyncExitStack() as stack:
        bare = await stack.enter_async_context(Bare(plane.server))
        jobs = await stack.enter_async_context(bare.watching(JOBS.format(namespace)))
        running = await stack.enter_async_context(bare.watching(PODS.format(namespace), "status.phase=Running"))
        before = _cpu(plane, operator)
        started = time.monotonic()
        created = await bare.create_all(groups)
        ended = await running.wait_for(NODES_PER_JOB * len(groups), _PATIENCE_SECONDS, "running pods")
        spent = {name: seconds - before[name] for name, seconds in _cpu(plane, operator).items()}
    burst = None if operator is None else _burst(_delays(namespace, created, jobs))
    return Rollout(len(groups), max(created) - started, ended - started, burst, spent, load)


def _delays(namespace: str, created: Sequence[float], jobs: Seen) -> list[float]:
    made = {name.removeprefix("ftj-"): at for name, at in jobs.first.items()}
    names = [manifest(namespace, number)["metadata"]["name"] for number in range(len(created))]
    return [max(0.0, made[name] - at) for name, at in zip(names, created, strict=True)]


def _burst(delays: Sequence[float]) -> Burst:
    return Burst(statistics.median(delays), sorted(delays)[min(len(delays) - 1, int(0.99 * len(delays)))])


def _cpu(plane: Plane, operator: OperatorProcess | None) -> dict[str, float]:
    times = os.times()
    spent = {**plane.cpu_seconds(), "client": times.user + times.system}
    return spent if operator is None else {**spent, "operator": operator.cpu_seconds()}


async def _states(bare: Bare, namespace: str) -> dict[str, int]:
    states = [status.get("state", "") for status in await _statuses(bare, namespace)]
    return {state: states.count(state) for state in sorted(set(states))}


async def _statuses(bare: Bare, namespace: str) -> list[dict[str, Any]]:
    return [item.get("status", {}) for item in (await bare.get(FINETUNEJOBS.format(namespace)))["items"]]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
