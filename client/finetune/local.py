"""The local backend: the same plan, configuration and launcher as a pod, one launcher process per node."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from finetune.manifests import Job
from finetune.progress_view import View, final_snapshot, snapshot
from finetune.result import RunResult, RunState, decisive, read_termination, result_of
from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_api.plan import Plan
from finetune_api.report import JobResult, Progress, Termination
from finetune_api.trainer_config import Rendezvous, TrainerConfig

INSTALL = 'pip install "finetune-operator[trainer]"'
_POLL_SECONDS = 0.25
_PEERS_SECONDS = 20.0  # how long the other launchers may take after one has failed


class TrainerMissingError(FineTuneError):
    """The trainer extra is not installed."""

    exit_class = ExitClass.INVALID_SPEC


class AlreadyRunningError(FineTuneError):
    """Another process runs the same job in the same state directory."""

    exit_class = ExitClass.INVALID_SPEC


class StateDirectoryError(FineTuneError):
    """The place for local state cannot be used."""

    exit_class = ExitClass.INVALID_SPEC


def check_trainer() -> None:
    """Refuse early, in one sentence, where the trainer's libraries are missing."""
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainerMissingError(
            f"finetune run trains on this machine and needs {', '.join(missing)}, not installed here",
            f"install the trainer: {INSTALL}",
        )


def run_directory(state_directory: Path, job: Job) -> Path:
    """Where a job of this name and content keeps its local state."""
    identity = job.identity
    return state_directory.absolute() / "runs" / identity.namespace / identity.name / identity.uid


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Refuse to run the same job twice at once."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("a+")
    except OSError as error:
        raise StateDirectoryError(
            f"the state of this run cannot be written to {directory} ({error.strerror})", "name another --state-dir"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise AlreadyRunningError(
                f"this job is already running here (process {holder}, {directory})",
                "wait for it, or stop it with Ctrl-C in its terminal",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Interruption:
    """Ctrl-C, SIGTERM and SIGHUP of the client while launchers run."""

    def __init__(self) -> None:
        self.count = 0
        self.number = signal.SIGINT

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Count the signals instead of dying of them."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.number = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + int(self.number)


@dataclass
class LauncherProcess:
    """The launcher of one node."""

    node_rank: int
    work: Path
    process: subprocess.Popen[bytes]

    def progress(self) -> Progress | None:
        """Its ``/progress``, or ``None`` while it is starting or ending."""
        try:
            about = json.loads((self.work / "launcher.json").read_text(encoding="utf-8"))
            if about["pid"] != self.process.pid:
                return None
            with urllib.request.urlopen(f"http://127.0.0.1:{about['port']}/progress", timeout=2) as answer:
                return Progress.model_validate_json(answer.read())
        except (OSError, ValidationError, ValueError, KeyError):
            return None


class LocalRun:
    """One run of one job on this machine."""

    def __init__(self, job: Job, plan: Plan, state_directory: Path) -> None:
        self.job = job
        self.plan = plan
        self.state_directory = state_directory.absolute()
        self.directory = run_directory(state_directory, job)
        self.interruption = Interruption()
        self._launchers: list[LauncherProcess] = []

    def run(self, view: View) -> RunResult:
        """Start the launchers, show progress, and say how it ended. Leaves no process behind."""
        with self.interruption.caught():
            try:
                self._start()
                self._watch(view)
            finally:
                self._end_all()
        ended = [read_termination(node.work, node.process.returncode) for node in self._launchers]
        result = self._result(decisive(ended))
        if result.state is RunState.COMPLETED and result.step:
            view.show(final_snapshot(result.step, result.metrics))
        written = self.directory / "result.json.new"  # whole or not at all
        text = result.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n"
        written.write_text(text, encoding="utf-8")
        written.replace(self.directory / "result.json")
        return result

    def _start(self) -> None:
        endpoint = f"127.0.0.1:{free_port() if self.plan.nodes > 1 else 0}"  # alone, node 0 binds what it chooses
        environment = launcher_environment(os.environ, self.plan)
        for node_rank in range(self.plan.nodes):
            work = self.directory / f"node-{node_rank}"
            work.mkdir(parents=True, exist_ok=True)
            for stale in ("launcher.json", "termination.json", "result.json"):
                (work / stale).unlink(missing_ok=True)
            config = self._config(work, endpoint)
            path = work / "trainer.json"
            path.write_text(config.model_dump_json(by_alias=True, exclude_none=True, indent=2), encoding="utf-8")
            with (work / "launcher.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "finetune_trainer", "--config", path, "--node-rank", str(node_rank)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches only us
                )
            self._launchers.append(LauncherProcess(node_rank, work, process))

    def _config(self, work: Path, endpoint: str) -> TrainerConfig:
        return TrainerConfig(
            job=self.job.identity,
            spec=self.job.spec,
            plan=self.plan,
            rendezvous=Rendezvous(endpoint=endpoint, minimum_nodes=self.plan.nodes, maximum_nodes=self.plan.nodes),
            work_directory=str(work),
            cache_directory=str(self.state_directory / "cache"),
            metrics_port=0,
            allow_remote_code=self.job.spec.model.trust_remote_code,  # your machine, your consent
        )

    def _watch(self, view: View) -> None:
        heard, failed_at = 0, None
        while any(node.process.poll() is None for node in self._launchers):
            if self.interruption.count > heard:
                heard = self.interruption.count
                self._pass_on(view, heard)
            failed = any(node.process.returncode not in {None, 0} for node in self._launchers)
            failed_at = failed_at or (time.monotonic() if failed else None)
            if failed_at is not None and time.monotonic() - failed_at > _PEERS_SECONDS:
                self._send(signal.SIGTERM)
                failed_at = float("inf")
            progress = self._launchers[0].progress()
            if progress is not None:
                view.show(snapshot(progress))
            time.sleep(_POLL_SECONDS)

    def _pass_on(self, view: View, count: int) -> None:
        if count == 1:
            view.say("stopping: the ranks write a checkpoint first (Ctrl-C again kills them now)")
            self._send(signal.SIGTERM)
        else:
            view.say("killing the ranks")
            self._send(signal.SIGINT)

    def _send(self, number: signal.Signals) -> None:
        for node in self._launchers:
            if node.process.poll() is None:
                node.process.send_signal(number)

    def _end_all(self) -> None:
        """After an error of our own: no launcher outlives its client."""
        self._send(signal.SIGTERM)
        for node in self._launchers:
            node.process.wait()

    def _result(self, ended: Termination) -> RunResult:
        result = None
        for node in self._launchers:
            if (node.work / "result.json").exists():
                result = JobResult.model_validate_json((node.work / "result.json").read_bytes())
        return result_of(ended, self.directory, result, self.plan)


def finished_before(directory: Path, job: Job) -> RunResult | None:
    """The result of an earlier run of the same job whose artifact still is what it was.

    One that cannot be read (cut short by a full disk, or of another version) is none: the run goes on from its
    checkpoints, and finds what it has published.
    """
    try:
        result = RunResult.model_validate_json((directory / "result.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if result.state is not RunState.COMPLETED or result.artifacts is None:
        return None
    return result if _artifact_digest(job, result.artifacts.uri) == result.artifacts.manifest_sha256 else None


def _artifact_digest(job: Job, uri: str) -> str | None:
    from finetune_storage import ObjectNotFound, ObjectStore, find_artifact

    output = job.spec.output
    store = ObjectStore.open(uri, endpoint=output.endpoint, region=output.region, path_style=output.path_style)
    try:
        return find_artifact(store)[2]
    except ObjectNotFound:
        return None


def launcher_environment(base: Mapping[str, str], plan: Plan) -> dict[str, str]:
    """Ours, passed through (credentials come from here), with pages on this machine only and processors dealt."""
    environment = {"FINETUNE_METRICS_HOST": "127.0.0.1", **base}
    if plan.nodes > 1 and plan.device == "cpu":  # a launcher would take the machine for its own
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.world_size)))
    return environment


def free_port() -> int:
    """A TCP port of this machine that is free now and that nobody is dealt by chance before it is bound.

    Not of the kernel's own choice, which it may make again for the next who asks, and below all that it chooses from
    (Linux from 32768, macOS from 49152) and the node ports of Kubernetes (30000).
    """
    candidates = list(range(20_000, 30_000))
    random.shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does: one in TIME_WAIT is free
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "no TCP port between 20000 and 29999 is free on 127.0.0.1")
