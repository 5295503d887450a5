"""Processes of the host that belong to the cluster: started in the background, recorded, found again, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.local.cluster.layout import ClusterError, Layout


def start(layout: Layout, name: str, command: Sequence[object], environment: dict[str, str] | None = None) -> int:
    """Start ``command`` in a session of its own with its output in ``log/<name>.log``; returns its pid."""
    log = layout.logs / f"{name}.log"
    words = [str(word) for word in command]
    pid = os.posix_spawn(
        words[0],
        words,
        environment if environment is not None else dict(os.environ),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    record(layout, name, pid)
    return pid


def record(layout: Layout, name: str, pid: int) -> None:
    """Remember a process with its start time, so that a reused number is not taken for it."""
    directory = layout.state / "processes"
    directory.mkdir(exist_ok=True)
    temporary = directory / f".{name}"
    temporary.write_text(json.dumps({"pid": pid, "started": _start_time(pid)}))
    temporary.replace(directory / f"{name}.json")


def recorded(layout: Layout) -> dict[str, int]:
    """Name -> pid of the recorded processes that live."""
    living = {}
    for path in sorted((layout.state / "processes").glob("*.json")):
        entry = json.loads(path.read_text())
        if entry["started"] is not None and _start_time(entry["pid"]) == entry["started"]:
            living[path.stem] = int(entry["pid"])
    return living


def end(pids: Sequence[int], seconds: float = 60.0) -> None:
    """SIGKILL and wait. Nothing here is worth a graceful stop, which takes an API server up to a minute.

    Raises:
        ClusterError: one lives on.
    """
    started = {pid: _start_time(pid) for pid in pids}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid, time_of_start in started.items():
        wait_until(
            lambda pid=pid, born=time_of_start: born is None or _start_time(pid) != born,  # type: ignore[misc]
            seconds,
            f"process {pid} does not end",
        )


def child(pid: int) -> int | None:
    """The first child of a process, or None."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        if (fields := _stat(int(path.parent.name))) and int(fields[1]) == pid and fields[0] != "Z":
            return int(path.parent.name)
    return None


def wait_until(
    condition: Callable[[], bool], seconds: float, problem: str, log: Path | None = None, pause: float = 0.05
) -> None:
    """Ask until the answer is yes.

    Raises:
        ClusterError: ``problem``, how long was waited, and the end of ``log``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            text = f"The local cluster: {problem} (waited {seconds:.0f} s)."
            raise ClusterError(text + (_tail(log) if log else ""))
        time.sleep(pause)


def run(*command: object, text: str | None = None) -> str:
    """Run to the end; returns its output.

    Raises:
        ClusterError: it failed; with what it said.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(words)}` failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _tail(log: Path) -> str:
    if not log.is_file():
        return f" There is no log {log}."
    lines = log.read_text(errors="replace").splitlines()[-12:]
    return f" The end of {log}:\n" + "\n".join(lines)


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()  # state, ppid, ...; the name before it may hold anything


def _start_time(pid: int) -> int | None:
    """In clock ticks since boot; None when the process is gone (a zombie is)."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])
