"""What a pod runs as process 1: prepare once, run the ranks, say how it ended.

read configuration -> fetch model files -> prepare data -> complete the plan -> ranks -> termination message
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from finetune_api.errors import FineTuneError, Problem, SpecError
from finetune_api.exits import Cause, ExitClass
from finetune_api.report import JobResult, Phase, Termination
from finetune_api.trainer_config import TrainerConfig
from finetune_trainer import progress, termination
from finetune_trainer.failures import Failure
from finetune_trainer.http import StatusServer
from finetune_trainer.preparation import prepare_node
from finetune_trainer.status import LauncherStatus
from finetune_trainer.stopping import Stopped, StopRequest
from finetune_trainer.worker_config import WorkerConfig

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "finetune_trainer.worker")
_PR_SET_CHILD_SUBREAPER = 36

Prepare = Callable[[TrainerConfig, LauncherStatus], WorkerConfig]


@dataclass
class Launcher:
    """One node of one job. ``command`` starts a rank (the path of worker.json is appended)."""

    config: TrainerConfig
    node_rank: int
    stop: StopRequest
    prepare: Prepare = prepare_node
    command: Sequence[str] = WORKER_COMMAND

    def __post_init__(self) -> None:
        self.work = Path(self.config.work_directory)
        self.status = LauncherStatus(self.config.job, self.node_rank, self.work)
        self.guilty: Failure | None = None

    def run(self) -> int:
        """Run to the end; the exit code."""
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_work_directory(self.work))
            except WorkDirectoryBusyError as error:  # its termination message belongs to the other one
                log.error("%s: %s (%s)", error.exit_class.value, error, error.hint)
                return error.exit_class.code
            try:
                server = StatusServer(self.status, self.config.metrics_port)
                stack.callback(server.close)
                self._announce(server.port)
                ended = self._train()
            except Stopped:
                ended = termination.interrupted_early(self.status.progress().phase.value)
            except Exception as error:
                if not isinstance(error, FineTuneError):
                    log.exception("defect in the launcher")
                ended = termination.refused(error)
            ended = self._with_attempts(ended)
            self._say(ended)
        return ended.exit_code

    def _with_attempts(self, ended: Termination) -> Termination:
        """With the attempts before, and the one that this end belongs to, for the ledger of the job."""
        attempts = self.status.ended
        resumed = None
        if self.status.gang:
            attempt = self.status.describe_attempt(ended.exit_class, ended.message, self.guilty)
            attempts = attempts if ended.exit_class == ExitClass.COMPLETED else (*attempts, attempt)
            resumed = attempt.resumed_from_step
        return ended.model_copy(update={"gang": self.status.gang, "ended": attempts, "resumed_from_step": resumed})

    def _train(self) -> Termination:
        with self.stop.interruptible():
            worker_config = self.prepare(self.config, self.status)
        self.status.plan = worker_config.trainer.plan
        path = self.work / "worker.json"
        progress.write_atomically(path, worker_config)
        return self._run_ranks(path, worker_config)

    def _run_ranks(self, worker_json: Path, worker_config: WorkerConfig) -> Termination:
        # torch is imported here: a manifest or data error must not wait seconds for it
        from finetune_trainer.attempts import run_attempts

        outcome = run_attempts(self, (*self.command, str(worker_json)), Path(worker_config.log_directory))
        self.guilty = outcome.guilty
        heartbeats = progress.read_heartbeats(self.work)
        plan = worker_config.trainer.plan
        if outcome.exit_class != ExitClass.COMPLETED:
            return termination.failed(outcome, plan, heartbeats)
        result = self._result(has_rank_zero=0 in outcome.ends)
        return termination.completed(result, plan)

    def _result(self, has_rank_zero: bool) -> JobResult | None:
        path = self.work / "result.json"
        if path.exists():
            return JobResult.model_validate_json(path.read_text(encoding="utf-8"))
        assert not has_rank_zero, "rank 0 reported success without writing result.json"
        return None

    def _announce(self, port: int) -> None:
        """Forget the run before, and say where this one can be reached."""
        progress.clear(self.work)
        for name in ("result.json", "termination.json", "worker.json"):
            (self.work / name).unlink(missing_ok=True)
        about = {"pid": os.getpid(), "port": port, "nodeRank": self.node_rank, "startedAt": time.time()}
        temporary = self.work / ".launcher.json"
        temporary.write_text(json.dumps(about), encoding="utf-8")
        temporary.replace(self.work / "launcher.json")

    def _say(self, ended: Termination) -> None:
        """The last word: for people on standard error, for machines in the termination message."""
        self.status.enter(Phase.DONE, ended.message)
        for line in ended.last_lines:
            print(f"  rank {ended.guilty_rank} | {line}", file=sys.stderr)
        hint = f" ({ended.hint})" if ended.hint else ""
        level = logging.INFO if ended.exit_class.cause in {Cause.NONE, Cause.INTERRUPTION} else logging.ERROR
        log.log(level, "%s: %s%s", ended.exit_class.value, ended.message, hint)
        configured = self.config.termination_message_path
        path = Path(configured) if configured else self.work / "termination.json"
        try:
            termination.write(path, ended)
        except OSError as error:
            log.error("the termination message could not be written to %s: %s", path, error)


class WorkDirectoryBusyError(FineTuneError):
    """Another launcher uses the same work directory."""

    exit_class = ExitClass.INVALID_SPEC


def lock_work_directory(work: Path) -> IO[str]:
    """Two launchers in one work directory would read each other's ranks."""
    work.mkdir(parents=True, exist_ok=True)
    file = (work / "launcher.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise WorkDirectoryBusyError(
            f"another launcher is running in {work}", "stop it first, or give this one a workDirectory of its own"
        ) from None
    return file


def read_config(path: Path) -> TrainerConfig:
    """The TrainerConfig at ``path``; :class:`SpecError` with every problem otherwise."""
    try:
        return TrainerConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(
            [Problem(str(path), None, f"cannot be read ({error.strerror})", "name the TrainerConfig with --config")]
        ) from error
    except UnicodeDecodeError as error:
        raise SpecError([Problem(str(path), None, "is not UTF-8 text", "write it as JSON in UTF-8")]) from error
    except ValidationError as error:
        problems = (
            Problem(
                ".".join(str(part) for part in found["loc"]) or str(path),
                found["input"] if found["loc"] else None,
                found["msg"],
                f"correct {path}",
            )
            for found in error.errors(include_url=False)
        )
        raise SpecError(problems) from error


def become_reaper() -> None:
    """Orphans of ranks fall to this process even where it is not process 1."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
