"""``python -m bench.scale``: the operator with 1,000 jobs, beside the same Jobs and Services made without any operator.

Everything runs in one go on this machine, in a network namespace of its own: a real etcd, kube-apiserver, controller
manager and scheduler, with kwok in the place of kubelets. Needs root for the namespace. Exit code 1: a target is
missed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tests.apiserver.server import binary

from bench.scale.measures import Rollout, burst_floor, finish_jobs, floor, idle, restart, rollout, settled, status_of
from bench.scale.operator_process import OperatorProcess
from bench.scale.plane import POD_NETWORK, PROGRAMS, Plane
from bench.scale.results import Results, table
from bench.scale.trainers import trainers

PARTS = ("floor", "operator", "restart", "idle")
_INSIDE = "FINETUNE_SCALE_INSIDE"


def main() -> int:
    options = _options()
    if os.environ.get(_INSIDE) != "1":
        for name in PROGRAMS:
            binary(name)  # built now if need be: the measurement's network leads nowhere
        _enter_a_network_of_its_own()
    signal.signal(signal.SIGTERM, _stop)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as place:
        directory = Path(place)
        try:
            asyncio.run(_measure(options, directory, results))
        except KeyboardInterrupt:
            say("stopped; nothing is left running")
            return 130
        finally:
            if options.keep:
                subprocess.run(["cp", "-r", place, options.keep], check=False)
    text, missed = table(results)
    say(text)
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    return 1 if missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="of the large rollout, 2 pods each")
    parser.add_argument("--burst", type=int, default=100, help="of the small rollout")
    parser.add_argument("--finished", type=int, default=10_000, help="finished jobs of the idle operator")
    parser.add_argument("--idle-seconds", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="100, 20 and 500 jobs, 10 s: does it work?")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: everything; restart needs operator")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--keep", type=Path, help="copy logs here")
    parser.add_argument("--wrap", default="", help="a command in front of the operator's, such as a profiler")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.burst, options.finished, options.idle_seconds = 100, 20, 500, 10.0
    options.only = options.only or list(PARTS)
    return options


def _enter_a_network_of_its_own() -> NoReturn:
    """Start anew where ports and pod addresses are this run's own; all of it goes with the last process."""
    if os.geteuid() != 0:
        sys.exit("bench.scale needs root: it makes a network namespace for the addresses of the fake pods.")
    os.environ[_INSIDE] = "1"
    setup = f'ip link set lo up && ip route add local {POD_NETWORK} dev lo && exec "$@"'
    command = ["unshare", "--net", "--", "sh", "-c", setup, "sh", sys.executable, "-m", "bench.scale", *sys.argv[1:]]
    os.execvp(command[0], command)


async def _measure(options: argparse.Namespace, directory: Path, results: Results) -> None:
    status = None
    if "floor" in options.only:
        with Plane(directory) as plane:
            results.floor += await _floor(options, plane)
        await _burst_floor(options, directory, results)
    if "operator" in options.only:
        with Plane(directory) as plane:
            async with trainers(plane.server):
                status = await _operator(options, plane, results)
    if "floor" in options.only:  # again: a machine may be faster or slower by then
        await _burst_floor(options, directory, results)
        with Plane(directory) as plane:
            results.floor_after += await _floor(options, plane)
    if "idle" in options.only:
        with Plane(directory, nodes=0) as plane:
            await _idle(options, plane, results, status)


async def _floor(options: argparse.Namespace, plane: Plane) -> list[Rollout]:
    found = []
    for number, jobs in enumerate((options.burst, options.jobs)):
        say(f"floor: {jobs:,} Jobs and Services by a bare client ...")
        found.append(await floor(plane, f"floor-{number}", jobs))
        say(f"  {found[-1]}")
    return found


async def _burst_floor(options: argparse.Namespace, directory: Path, results: Results) -> None:
    say(f"floor of a burst: {options.burst:,} FineTuneJobs and their children by a bare client ...")
    with Plane(directory) as plane:
        results.burst_floor.append(await burst_floor(plane, "burst", options.burst))
    say(f"  {results.burst_floor[-1]}")


async def _operator(options: argparse.Namespace, plane: Plane, results: Results) -> dict[str, object]:
    operator = OperatorProcess(plane, tuple(options.wrap.split()))
    operator.start()
    say(f"operator: ready after {operator.wait_ready():.2f} s")
    await asyncio.sleep(2)  # its watches are open
    for number, jobs in enumerate((options.burst, options.jobs)):
        say(f"operator: {jobs:,} FineTuneJobs ...")
        result, cost = await rollout(plane, operator, f"operator-{number}", jobs)
        results.operator.append(result)
        results.cost.append(cost)
        say(f"  {result}\n  {cost}")
    status = await status_of(plane, "operator-0")
    if "restart" in options.only:
        live = options.burst + options.jobs
        await settled(plane, [f"operator-{number}" for number in range(2)])
        results.live = await idle(operator, live, 20)
        say(f"  live: {results.live}")
        results.restart = await restart(plane, operator, "operator-0", live, 15)
        say(f"  {results.restart}")
    operator.stop()
    return status


async def _idle(options: argparse.Namespace, plane: Plane, results: Results, status: dict[str, object] | None) -> None:
    say(f"idle: {options.finished:,} finished FineTuneJobs ...")
    await finish_jobs(plane, "finished", options.finished, _ended(status))
    operator = OperatorProcess(plane)
    operator.start()
    ready = operator.wait_ready()
    operator.wait_listed("Complete", options.finished)
    await asyncio.sleep(5)
    results.idle = await idle(operator, options.finished, options.idle_seconds, ready)
    say(f"  {results.idle}")
    operator.stop()


def _ended(status: dict[str, object] | None) -> dict[str, object]:
    """The status of a live job, brought to its end."""
    kept = dict(status or {"observedGeneration": 1})
    done = {
        "type": "Complete",
        "status": "True",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "reason": "Complete",
        "message": "the adapter is published",
    }
    before = [one for one in kept.get("conditions", []) if one["type"] not in {"Complete", "Running"}]  # type: ignore
    return {**kept, "state": "Complete", "message": "the adapter is published", "conditions": [*before, done]}


def _stop(_number: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)  # one way to end: asyncio cancels, contexts stop what they started


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
