"""torchrun's elastic agent with our own ranks underneath.

What differs from ``torchrun``: ranks get the whole grace period after SIGTERM (torchrun: 30 s), a restart happens only
when the guilty rank's end is worth one, the launchers of a job agree on who is guilty, ranks are numbered by node
rank, and every end keeps its meaning instead of becoming exit code 1.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousHandler

from finetune_api.exits import Cause, ExitClass
from finetune_api.report import Phase
from finetune_trainer import progress
from finetune_trainer.container import out_of_memory_kills
from finetune_trainer.failures import Failure, Outcome, classify, guilty
from finetune_trainer.ranks import RankGroup, RankProcess
from finetune_trainer.rendezvous import AttemptStore
from finetune_trainer.status import LauncherStatus
from finetune_trainer.stopping import StopRequest

log = logging.getLogger(__name__)

FAILURE_GRACE_SECONDS = 5.0  # for peers of a dead rank: they hang in a collective and cannot write a checkpoint
SETTLE_SECONDS = 3.0  # how long a broken collective waits for its cause to show up
LEAVE_SECONDS = 20.0


@dataclass(frozen=True)
class AgentSettings:
    """What one node's agent needs to know."""

    command: Sequence[str]  # of one rank; torchrun's variables come by environment
    environment: Mapping[str, str]
    work_directory: Path
    log_directory: Path  # ``attempt-N`` folders go here
    node_rank: int
    ranks_per_node: int
    address: str  # of this machine, as the other nodes see it
    max_restarts: int
    grace_seconds: float
    failure_grace_seconds: float = FAILURE_GRACE_SECONDS
    settle_seconds: float = SETTLE_SECONDS
    count_memory_kills: Callable[[], int | None] = out_of_memory_kills


class TrainerAgent(SimpleElasticAgent):
    """Runs the ranks of one node until all nodes are done, a failure is final, or somebody asks to stop."""

    def __init__(
        self, settings: AgentSettings, handler: RendezvousHandler, status: LauncherStatus, stop: StopRequest
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=settings.ranks_per_node,
            rdzv_handler=handler,
            entrypoint=settings.command[0],
            max_restarts=settings.max_restarts,
            monitor_interval=0.1,
        )
        super().__init__(spec)
        self._remaining_restarts: int = spec.max_restarts  # torchrun's own; named here because we change it
        self.settings = settings
        self.status = status
        self.stop = stop
        self.outcome = Outcome(ExitClass.INTERNAL_ERROR)
        self._group: RankGroup | None = None
        self._attempt_store: AttemptStore | None = None
        self._gang = ""
        self._failed_at: float | None = None
        self._said_done = False
        self._memory_kills_before = 0

    # ---- torchrun calls these -------------------------------------------------------------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other nodes, number the ranks, agree where their process group will meet."""
        spec = worker_group.spec
        if self.status.gang:  # we saw nothing fail, and another launcher waits for us
            self._end_unseen()
        self.status.watched(None)
        self.status.enter(Phase.RENDEZVOUS, f"waiting for {spec.rdzv_handler.settings.min_nodes} node(s)")
        with self.stop.interruptible():
            info = spec.rdzv_handler.next_rendezvous()
            store = AttemptStore(info, self.settings.node_rank)
            position = store.node_position()
            worker_group.master_addr, worker_group.master_port = store.worker_endpoint(position, self.settings.address)
            self._gang = store.gang()
        self._attempt_store, self._store = store, info.store
        worker_group.store = info.store
        worker_group.group_rank, worker_group.group_world_size = position, info.world_size
        first, size = position * spec.local_world_size, info.world_size * spec.local_world_size
        worker_group.workers = [
            Worker(local, first + local, first + local, size, size) for local in range(spec.local_world_size)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start the ranks of this node in a fresh attempt: nothing of an earlier one may be left."""
        self._failed_at, self._said_done = None, False
        self._memory_kills_before = self.settings.count_memory_kills() or 0
        progress.clear(self.settings.work_directory)
        self.status.begin_attempt(self._gang)
        self.status.restarts = worker_group.spec.max_restarts - self._remaining_restarts
        self.status.enter(Phase.LOADING_MODEL)
        group = RankGroup(self.settings.command, next_attempt_directory(self.settings.log_directory))
        self._group = group
        return {
            worker.local_rank: group.start(
                worker.global_rank, worker.local_rank, self._environment(worker_group, worker)
            ).process.pid
            for worker in worker_group.workers
        }

    def _monitor_workers(self, _worker_group: WorkerGroup) -> RunResult:
        """Look at the ranks once and say how the group is."""
        assert self._group is not None
        assert self._attempt_store is not None
        self.status.watched(time.monotonic())
        if self.stop.requested:
            return self._stop_on_request()
        self._group.poll()
        failures = [self._classify(rank) for rank in self._group.ranks if rank.exit_code]
        verdict = self._attempt_store.failure() if self._attempt_store.nodes > 1 else None
        if verdict is None and failures and self._settled(failures):
            verdict = self._propose(guilty(failures))
        if verdict is not None:
            return self._fail(Failure.model_validate_json(verdict))
        if not failures and not self._group.running:
            if not self._said_done:
                self._attempt_store.set_done()
                self._said_done = True
            if self._attempt_store.all_done():
                self.outcome = Outcome(ExitClass.COMPLETED, ends=progress.read_ends(self.settings.work_directory))
                return self._succeeded()
        return RunResult(WorkerState.HEALTHY)

    def _stop_workers(self, _worker_group: WorkerGroup) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: Any = None, timeout: float | None = None) -> None:
        """Make sure that no rank of this attempt is left. The first caller decides how long it may take."""
        del death_sig, timeout
        self._wind_down(self.settings.failure_grace_seconds)
        if self._attempt_store is not None:
            self._attempt_store.close()

    def _exit_barrier(self) -> None:
        """The ranks of every node have completed: nobody leaves before everybody knows."""
        if self._attempt_store is not None and self._attempt_store.nodes > 1:
            self._attempt_store.leave(LEAVE_SECONDS)

    # ---- ours -----------------------------------------------------------------------------------------------------

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """torchrun's variables on top of what the ranks of this node share."""
        return {
            **self.settings.environment,
            "RANK": str(worker.global_rank),
            "LOCAL_RANK": str(worker.local_rank),
            "GROUP_RANK": str(group.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": group.spec.role,
            "WORLD_SIZE": str(worker.world_size),
            "LOCAL_WORLD_SIZE": str(group.spec.local_world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.status.restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(group.spec.max_restarts),
            "TORCHELASTIC_RUN_ID": group.spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this launcher serves MASTER_ADDR:MASTER_PORT
        }

    def _classify(self, rank: RankProcess) -> Failure:
        kills = (self.settings.count_memory_kills() or 0) - self._memory_kills_before
        end = progress.read_ends(self.settings.work_directory).get(rank.rank)
        failure = classify(rank, end, self.settings.node_rank, kills)
        if failure.step is not None:
            return failure
        beat = progress.read_heartbeats(self.settings.work_directory).get(rank.rank)
        return failure if beat is None else failure.model_copy(update={"step": beat.step, "phase": beat.phase})

    def _settled(self, failures: list[Failure]) -> bool:
        """Whether the guilty rank is known: a failure that others may have caused waits for its cause."""
        assert self._group is not None
        assert self._attempt_store is not None
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        if not guilty(failures).secondary or now - self._failed_at >= self.settings.settle_seconds:
            return True
        return self._attempt_store.nodes == 1 and not self._group.running

    def _propose(self, failure: Failure) -> str:
        assert self._attempt_store is not None
        text = failure.model_dump_json()
        return self._attempt_store.agree_on_failure(text) if self._attempt_store.nodes > 1 else text

    def _fail(self, failure: Failure) -> RunResult:
        """Stop everything; torchrun restarts while restarts remain, so take them away from a final failure."""
        self.outcome = Outcome(failure.exit_class, guilty=failure)
        log.error("rank %d failed (%s): %s", failure.rank, failure.exit_class.value, failure.message)
        if self._by_another_launcher(failure):
            self._remaining_restarts += 1  # of the job's owner or its cluster: not counted
            self.status.end_attempt(self.status.describe_attempt(failure.exit_class, failure.message, failure))
            log.warning("another launcher is being stopped: waiting for its replacement")
        elif not failure.exit_class.restartable:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            self.status.end_attempt(self.status.describe_attempt(failure.exit_class, failure.message, failure))
            done, allowed = self.status.restarts + 1, self.settings.max_restarts
            log.warning("restarting all ranks from the newest whole checkpoint (restart %d of %d)", done, allowed)
        self._wind_down(self.settings.failure_grace_seconds)
        self.outcome.ends = progress.read_ends(self.settings.work_directory)
        return RunResult(WorkerState.FAILED)

    def _end_unseen(self) -> None:
        """The attempt is over: another launcher was replaced, or acted on a failure before our next look at it."""
        assert self._attempt_store is not None
        verdict = self._attempt_store.failure()
        if verdict is None:
            lost = "another launcher was lost and came back"
            self.status.end_attempt(self.status.describe_attempt(ExitClass.COMMUNICATION_FAILED, lost))
            return
        failure = Failure.model_validate_json(verdict)
        log.error("rank %d failed (%s): %s", failure.rank, failure.exit_class.value, failure.message)
        if not self._by_another_launcher(failure):
            self._remaining_restarts -= 1  # torchrun does not count a restart for a launcher that waits
        self.status.end_attempt(self.status.describe_attempt(failure.exit_class, failure.message, failure))

    def _by_another_launcher(self, failure: Failure) -> bool:
        """Whether the ranks ended because one of them was asked to, and it was not this launcher that asked.

        Ranks agree on stopping, so all of them have written the checkpoint. This node keeps its model and its data.
        """
        assert self._attempt_store is not None
        return _by_request(failure) and self._attempt_store.nodes > 1

    def _stop_on_request(self) -> RunResult:
        """SIGTERM or Ctrl-C: the ranks write a checkpoint and end; the whole grace period is theirs."""
        assert self._group is not None
        log.info("stopping: the ranks have %g s to write a checkpoint", self.settings.grace_seconds)
        self.status.stopping = True
        self._remaining_restarts = 0
        self._wind_down(self.settings.grace_seconds)
        ends = progress.read_ends(self.settings.work_directory)
        killed = tuple(rank.rank for rank in self._group.ranks if rank.killed_by_us)
        if all(rank.exit_code == 0 for rank in self._group.ranks):
            self.outcome = Outcome(ExitClass.COMPLETED, ends=ends)  # the last step came before the signal
            return self._succeeded()
        failures = [self._classify(rank) for rank in self._group.ranks if rank.exit_code and not rank.killed_by_us]
        broken = [failure for failure in failures if failure.rank in ends and not _by_request(failure)]
        self.outcome = Outcome(ExitClass.INTERRUPTED, guilty(broken) if broken else None, ends, killed)
        return RunResult(WorkerState.FAILED)

    def _succeeded(self) -> RunResult:
        assert self._group is not None
        return RunResult(WorkerState.SUCCEEDED, return_values={rank.rank: None for rank in self._group.ranks})

    def _wind_down(self, grace_seconds: float) -> None:
        if self._group is None:
            return
        self._group.stop(
            grace_seconds, hurry=lambda: self.stop.hurry, tick=lambda: self.status.watched(time.monotonic())
        )
        self._group.close()


def _by_request(failure: Failure) -> bool:
    return failure.exit_class.cause == Cause.INTERRUPTION


def next_attempt_directory(logs: Path) -> Path:
    """The first free ``attempt-N``: logs of earlier launchers in the same work directory stay readable."""
    logs.mkdir(parents=True, exist_ok=True)
    taken = [int(name[8:]) for name in os.listdir(logs) if name.startswith("attempt-") and name[8:].isdigit()]
    return logs / f"attempt-{max(taken, default=0) + 1}"
