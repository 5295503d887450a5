"""Run a command and watch its process tree from outside: step times from its lines, memory from /proc."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLES_PER_SECOND = 8
STEP_LINE = re.compile(r"\bstep (\d+)/(\d+)\b")


@dataclass
class Measurement:
    """What was seen of one run. Times are seconds since the process was started."""

    step_times: dict[int, float] = field(default_factory=dict)
    peak_bytes: int = 0  # proportional set size of the tree (shared pages counted once), largest sample
    peak_anonymous_bytes: int = 0
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def first_step_seconds(self) -> float:
        return self.step_times[1]

    def seconds_between_steps(self) -> float:
        """From the end of step 1 to the end of the last one."""
        return self.step_times[max(self.step_times)] - self.step_times[1]


def run(command: Sequence[str], environment: dict[str, str], directory: Path) -> Measurement:
    """Run to the end. ``directory`` takes the log.

    Raises RuntimeError with the last lines if the command fails or prints no step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    result = Measurement()
    started = time.monotonic()
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, result, stop), daemon=True)
    sampler.start()
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic() - started
        result.lines.append(line.rstrip())
        if match := STEP_LINE.search(line):
            result.step_times.setdefault(int(match[1]), now)
    code = process.wait()
    stop.set()
    sampler.join()
    result.seconds = time.monotonic() - started
    (directory / "log.txt").write_text("\n".join(result.lines) + "\n")
    if code != 0 or not result.step_times:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n" + "\n".join(result.lines[-20:]))
    return result


def _sample(pid: int, result: Measurement, stop: threading.Event) -> None:
    while not stop.wait(1.0 / SAMPLES_PER_SECOND):
        total = anonymous = 0
        for one in _tree(pid):
            values = proportional_memory(one)
            total += values[0]
            anonymous += values[1]
        result.peak_bytes = max(result.peak_bytes, total)
        result.peak_anonymous_bytes = max(result.peak_anonymous_bytes, anonymous)


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def proportional_memory(pid: int) -> tuple[int, int]:
    """(all, anonymous) bytes of a process, shared pages divided among their users; zeros once it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0, 0
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, flags=re.MULTILINE))
    return int(values.get("Pss", 0)) * 1024, int(values.get("Pss_Anon", 0)) * 1024
