"""From a prepared node to the outcome of its ranks: rendezvous, agent, and what can break between the two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from finetune_api.errors import FineTuneError
from finetune_api.exits import Cause, ExitClass
from finetune_api.report import Phase
from finetune_trainer.agent import AgentSettings, TrainerAgent
from finetune_trainer.failures import Outcome
from finetune_trainer.rank_environment import own_address, rank_environment
from finetune_trainer.rendezvous import RendezvousFailedError, join, wait_for_endpoint

if TYPE_CHECKING:
    from finetune_trainer.launcher import Launcher


class LauncherLostError(FineTuneError):
    """The launcher that hosts the rendezvous store went away, or ended the job."""

    exit_class = ExitClass.COMMUNICATION_FAILED


def run_attempts(launcher: Launcher, command: Sequence[str], logs: Path) -> Outcome:
    """Meet the other launchers and run ranks until the end of the job on this node."""
    config, rendezvous = launcher.config, launcher.config.rendezvous
    launcher.status.enter(Phase.RENDEZVOUS, f"looking for node 0 at {rendezvous.endpoint}")
    with launcher.stop.interruptible():
        if launcher.node_rank != 0:
            wait_for_endpoint(rendezvous, launcher.node_rank, tick=lambda: None)
        handler = join(rendezvous, launcher.node_rank, config.job.uid, config.collective_timeout_seconds)
    settings = AgentSettings(
        command=command,
        environment=rank_environment(
            config.plan.device, config.plan.processes_per_node, rendezvous.endpoint, os.environ
        ),
        work_directory=launcher.work,
        log_directory=logs,
        node_rank=launcher.node_rank,
        ranks_per_node=config.plan.processes_per_node,
        address=own_address(rendezvous.endpoint),
        max_restarts=config.spec.run_policy.max_restarts,
        grace_seconds=config.termination_grace_seconds,
    )
    agent = TrainerAgent(settings, handler, launcher.status, launcher.stop)
    try:
        _run(agent, launcher)
    except RendezvousTimeoutError as error:
        raise RendezvousFailedError(
            f"fewer than {rendezvous.minimum_nodes} launchers met at {rendezvous.endpoint} within"
            f" {rendezvous.timeout_seconds} s",
            "see whether every node's launcher runs and has finished preparing its data",
        ) from error
    except (RendezvousError, DistError) as error:
        raise LauncherLostError(
            f"node {launcher.node_rank} lost the rendezvous store of node 0 at {rendezvous.endpoint}"
            f" ({str(error).splitlines()[0]})",
            "see how the launcher of node 0 ended; the job resumes from the newest whole checkpoint",
        ) from error
    finally:
        _close(handler, agent)
    return agent.outcome


def _run(agent: TrainerAgent, launcher: Launcher) -> None:
    try:
        agent.run()
    except (RendezvousClosedError, RendezvousGracefulExitError) as error:
        if agent.outcome.guilty is None:
            raise LauncherLostError(
                f"another launcher ended the job while node {launcher.node_rank} was joining",
                "see the termination message of the other nodes",
            ) from error


def _close(handler: RendezvousHandler, agent: TrainerAgent) -> None:
    """End the rendezvous for everybody when a restart makes no sense; else leave it open for our replacement."""
    final = agent.outcome.exit_class.cause in {Cause.NONE, Cause.USER}
    if final:
        handler.shutdown()
    else:
        handler._stop_heartbeats()
