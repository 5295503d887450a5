"""Two launchers of one job on one machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.unit.trainer.launcher_rig import Node, Rig

from finetune.local import free_port
from finetune_api.exits import ExitClass
from finetune_api.report import Phase

pytestmark = pytest.mark.multiprocess


def start_both(rig: Rig) -> tuple[Node, Node]:
    """Node 1 first: in a cluster nobody waits for node 0 to be there."""
    rig.endpoint = f"127.0.0.1:{free_port()}"
    second = rig.start(1)
    return rig.start(0), second


def test_two_launchers_meet_and_number_their_ranks_by_node(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=2)
    dist = connect()
    import torch
    seen = [None] * WORLD
    dist.all_gather_object(seen, (RANK, LOCAL, WORK.name))
    dist.barrier()
    if RANK == 0:
        print(seen)
    succeed()
    """
    first, second = start_both(Rig(tmp_path, script, nodes=2, ranks=2))
    assert (first.wait(), second.wait()) == (0, 0)
    assert first.output == "[(0, 0, 'node-0'), (1, 1, 'node-0'), (2, 0, 'node-1'), (3, 1, 'node-1')]\n"
    assert second.output == ""
    assert first.termination().artifact_uri == "file:///out/"
    assert second.termination().message == "this node completed; the node with rank 0 reports the artifact"


def test_a_user_error_on_one_node_ends_the_other_with_the_same_verdict(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=9)
    dist = connect()
    dist.barrier()
    if RANK == 1:
        end(ExitClass.INVALID_DATA, "line 3 of a.jsonl is not JSON", exception="DataError")
    try:
        dist.barrier()
    except Exception as error:
        end(ExitClass.COMMUNICATION_FAILED, str(error))
    succeed()
    """
    first, second = start_both(Rig(tmp_path, script, nodes=2, ranks=1))
    assert (first.wait(), second.wait()) == (11, 11)
    for node in (first, second):
        ended = node.termination()
        assert (ended.exit_class, ended.guilty_rank) == (ExitClass.INVALID_DATA, 1)
        assert ended.message == "line 3 of a.jsonl is not JSON"


KILLED_ONCE = """
    beat.update(phase=Phase.TRAINING)
    with open(WORK / "restarts", "a") as counted:
        counted.write(f" {RESTART}" if RESTART else "0")
    dist = connect()
    dist.barrier()
    if RANK == 1 and RESTART == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except Exception as error:
        end(ExitClass.COMMUNICATION_FAILED, str(error))
    succeed()
"""


def test_a_killed_rank_on_one_node_restarts_both(tmp_path: Path) -> None:
    first, second = start_both(Rig(tmp_path, KILLED_ONCE, nodes=2, ranks=1))
    assert (first.wait(), second.wait()) == (0, 0)
    for node in (first, second):
        assert "rank 1 failed (RankKilled): rank 1 was killed by SIGKILL" in node.errors
        assert sorted(path.name for path in (node.work / "logs").iterdir()) == ["attempt-1", "attempt-2"]


def test_a_failure_that_the_other_launcher_was_quicker_to_act_on_is_told_all_the_same(tmp_path: Path) -> None:
    rig = Rig(tmp_path, KILLED_ONCE, nodes=2, ranks=1, environment={"SLOW_LOOKS": ""})
    rig.endpoint = f"127.0.0.1:{free_port()}"
    second = rig.start(1)
    rig.environment = {"SLOW_LOOKS": "1"}
    first = rig.start(0)
    assert (first.wait(), second.wait()) == (0, 0)
    ours, theirs = (node.termination().ended for node in (first, second))
    assert [(end.exit_class, end.guilty_rank) for end in ours] == [(ExitClass.RANK_KILLED, 1)]
    assert [(end.gang, end.message) for end in ours] == [(end.gang, end.message) for end in theirs]
    assert [(node.work / "restarts").read_text() for node in (first, second)] == ["0 1", "0 1"]


def test_sigterm_to_both_launchers_stops_both(tmp_path: Path) -> None:
    script = "beat.update(phase=Phase.TRAINING)\nuntil_stopped()\nend(ExitClass.INTERRUPTED)"
    first, second = start_both(Rig(tmp_path, script, nodes=2, ranks=1))
    for node in (first, second):
        node.wait_for_phase(Phase.TRAINING)
    for node in (second, first):  # node 0 serves the store
        node.signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (143, 143)


def test_a_lost_launcher_of_node_0_is_told(tmp_path: Path) -> None:
    script = "beat.update(phase=Phase.TRAINING)\nuntil_stopped()\nend(ExitClass.INTERRUPTED)"
    rig = Rig(tmp_path, script, nodes=2, ranks=1)
    first, second = start_both(rig)
    for node in (first, second):  # a rank that is not yet tied to its launcher would outlive it
        node.wait_for_phase(Phase.TRAINING)
    first.signal(signal.SIGKILL)
    assert second.wait() == 33
    ended = second.termination()
    assert ended.exit_class == ExitClass.COMMUNICATION_FAILED
    assert ended.message.startswith(f"node 1 lost the rendezvous store of node 0 at {rig.endpoint} (")
    first.wait()


def test_a_node_that_waits_for_node_0_in_vain_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "succeed()", nodes=2, ranks=1, rendezvous_seconds=2)
    node = rig.start(1)
    assert node.wait() == 32
    ended = node.termination()
    assert ended.exit_class == ExitClass.RENDEZVOUS_FAILED
    assert ended.message == (
        f"the launcher of node 1 could not reach node 0 at {rig.endpoint} within 2 s ([Errno 111] Connection refused)"
    )


def test_node_0_that_waits_for_the_others_in_vain_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "succeed()", nodes=2, ranks=1, rendezvous_seconds=3)
    node = rig.start(0)
    assert node.wait() == 32
    assert node.termination().message == f"fewer than 2 launchers met at {rig.endpoint} within 3 s"


def test_sigterm_while_waiting_for_the_other_node_ends_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "succeed()", nodes=2, ranks=1, rendezvous_seconds=600)
    node = rig.start(0)
    node.wait_for(lambda progress: progress.phase == Phase.RENDEZVOUS, "rendezvous")
    time.sleep(1.0)
    node.signal(signal.SIGTERM)
    assert node.wait() == 143
    assert node.termination().message == "stopped while the launcher was in phase Rendezvous; nothing is lost"


STOP_TOGETHER = """
    import torch
    beat.update(phase=Phase.TRAINING, step=5, resumed_from_step=2)
    dist = connect()
    stopped = WORK.parent / "stopped"
    while True:
        votes = torch.tensor([float(stop.requested)])
        dist.all_reduce(votes)
        if votes:
            stopped.touch()
            end(ExitClass.INTERRUPTED, f"rank {RANK} was asked to stop")
        if stopped.exists():
            succeed()
"""


def test_a_launcher_whose_peer_is_stopped_waits_for_its_replacement(tmp_path: Path) -> None:
    rig = Rig(tmp_path, STOP_TOGETHER, nodes=2, ranks=1, max_restarts=0)
    first, second = start_both(rig)
    running = first.wait_for_phase(Phase.TRAINING)
    assert (running.ended, running.attempt) == ((), 1)
    assert running.gang == second.wait_for_phase(Phase.TRAINING).gang != ""
    second.signal(signal.SIGTERM)
    assert second.wait() == 143
    said = second.termination()
    assert (said.gang, [end.gang for end in said.ended]) == (running.gang, [running.gang])
    replacement = rig.start(1)
    assert (first.wait(), replacement.wait()) == (0, 0)
    completed = first.termination()
    assert [end.gang for end in completed.ended] == [running.gang]
    ended = completed.ended[0]
    assert (ended.exit_class, ended.number) == (ExitClass.INTERRUPTED, 1)
    assert (ended.resumed_from_step, ended.last_step) == (2, 5)
    assert completed.gang not in ("", running.gang)
    assert replacement.termination().gang == completed.gang


def test_every_launcher_remembers_a_restart_in_place_by_the_same_word(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=4, resumed_from_step=0)
    dist = connect()
    dist.barrier()
    if RANK == 1 and RESTART == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except Exception as error:
        end(ExitClass.COMMUNICATION_FAILED, str(error))
    until_stopped()
    end(ExitClass.INTERRUPTED)
    """
    first, second = start_both(Rig(tmp_path, script, nodes=2, ranks=1))
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        time.sleep(0.2)
        pages = [node.progress() for node in (first, second) if (node.work / "launcher.json").exists()]
        if [page.attempt for page in pages] == [2, 2] and all(page.ranks for page in pages):
            break
    assert [len(page.ended) for page in pages] == [1, 1]
    ours, theirs = (page.ended[0] for page in pages)
    assert ours.gang == theirs.gang not in ("", pages[0].gang)
    assert pages[0].gang == pages[1].gang != ""
    assert (ours.exit_class, ours.guilty_rank, ours.guilty_node) == (ExitClass.RANK_KILLED, 1, 1)
    assert (ours.message, ours.last_step, ours.resumed_from_step) == ("rank 1 was killed by SIGKILL", 4, 0)
    assert ours.ended_at == theirs.ended_at
    for node in (second, first):
        node.signal(signal.SIGTERM)
    assert (first.wait(), second.wait()) == (143, 143)


POWER_CUT = """
import subprocess, sys, time
from datetime import timedelta
from torch.distributed import DistError, TCPStore
from finetune_trainer import rendezvous

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
host = TCPStore("127.0.0.1", 29400, is_master=True, wait_for_workers=False)
client = TCPStore("127.0.0.1", 29400, is_master=False)
assert rendezvous.bound_silence(29400, seconds=6) == 2  # the host is a client of its own
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
started = time.monotonic()
try:
    client.check(["failure"])
except DistError as error:
    print(f"{type(error).__name__} after {time.monotonic() - started:.0f} s", flush=True)
"""


def test_a_store_whose_machine_says_nothing_any_more_is_lost_within_the_limit() -> None:
    """In a network of its own, whose only link goes down: no FIN, no RST. torch itself would wait 15 minutes."""
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", POWER_CUT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    kind, _, seconds = done.stdout.partition(" after ")
    assert kind == "DistNetworkError", done.stderr
    assert 5 <= int(seconds.split()[0]) <= 60
