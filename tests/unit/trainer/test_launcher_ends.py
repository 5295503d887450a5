"""How one launcher ends: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tests.unit.trainer.launcher_rig import Rig

from finetune_api.exits import ExitClass
from finetune_api.report import Phase

pytestmark = pytest.mark.multiprocess


def test_a_completed_job_ends_with_the_artifact_in_its_termination_message(tmp_path: Path) -> None:
    code, node = Rig(tmp_path, "beat.update(phase=Phase.TRAINING, step=7)\nprint('rank', RANK)\nsucceed()").run()
    ended = node.termination()
    assert (code, ended.exit_class) == (0, ExitClass.COMPLETED)
    assert ended.message == "completed after 7 steps: 3 files at file:///out/"
    assert (ended.artifact_uri, ended.artifact_manifest_sha256) == ("file:///out/", "0" * 64)
    assert ended.metrics == {"trainLoss": 1.5}
    assert ended.plan is not None
    assert node.output == "rank 0\n"  # rank 1 speaks into its log only
    assert (node.work / "logs/attempt-1/rank-1.log").read_text() == "rank 1\n"


def test_a_user_error_is_final_although_restarts_are_left(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=7)
    if RANK == 1:
        print("the last line")
        end(ExitClass.NUMERICAL_ERROR, "the loss of step 7 is NaN", hint="lower it", exception="NumericalError")
    until_stopped()
    end(ExitClass.INTERRUPTED)
    """
    code, node = Rig(tmp_path, script).run()
    ended = node.termination()
    assert (code, ended.exit_code, ended.exit_class) == (14, 14, ExitClass.NUMERICAL_ERROR)
    assert (ended.guilty_rank, ended.step, ended.phase) == (1, 7, Phase.TRAINING)
    assert (ended.message, ended.hint) == ("the loss of step 7 is NaN", "lower it")
    assert (ended.exception, ended.last_lines) == ("NumericalError", ("the last line",))
    assert [path.name for path in (node.work / "logs").iterdir()] == ["attempt-1"]


def test_a_killed_rank_is_guilty_not_the_peer_whose_collective_broke_and_a_restart_completes(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=3 + RESTART)
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
    code, node = Rig(tmp_path, script).run()
    assert code == 0
    assert "rank 1 failed (RankKilled): rank 1 was killed by SIGKILL" in node.errors
    assert "restarting all ranks from the newest whole checkpoint (restart 1 of 3)" in node.errors
    assert node.termination().step == 4
    assert sorted(path.name for path in (node.work / "logs").iterdir()) == ["attempt-1", "attempt-2"]


def test_restarts_stop_at_the_budget(tmp_path: Path) -> None:
    code, node = Rig(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", ranks=1, max_restarts=2).run()
    ended = node.termination()
    assert (code, ended.exit_class, ended.guilty_rank) == (31, ExitClass.RANK_KILLED, 0)
    assert ended.message == "rank 0 was killed by SIGKILL"
    assert sorted(path.name for path in (node.work / "logs").iterdir()) == ["attempt-1", "attempt-2", "attempt-3"]


def test_files_of_an_earlier_attempt_are_gone_before_the_next_one_speaks(tmp_path: Path) -> None:
    script = """
    if RESTART == 0:
        beat.update(phase=Phase.TRAINING, step=99)
        end(ExitClass.STORAGE_UNAVAILABLE, "away")
    others = [path for path in (WORK / "ranks").iterdir() if path.name.split(".")[0] != str(RANK)]
    mine = json.loads((WORK / "ranks" / f"{RANK}.json").read_text())
    assert not others and not (WORK / "ranks" / f"{RANK}.end.json").exists() and mine.get("step", 0) == 0
    succeed()
    """
    code, node = Rig(tmp_path, script, ranks=1).run()
    assert (code, node.termination().step) == (0, 0)


def test_sigterm_reaches_the_ranks_and_their_checkpoint_is_named(tmp_path: Path) -> None:
    script = """
    beat.update(phase=Phase.TRAINING, step=5)
    until_stopped()
    beat.update(phase=Phase.CHECKPOINTING)
    while not (WORK / "seen").exists():
        time.sleep(0.02)
    beat.update(checkpoint_step=6, checkpoint_uri="file:///out/checkpoints/step-00000006/")
    end(ExitClass.INTERRUPTED, "stopped")
    """
    node = Rig(tmp_path, script).start()
    node.wait_for_phase(Phase.TRAINING, ranks=2)
    node.signal(signal.SIGTERM)
    node.wait_for_phase(Phase.CHECKPOINTING, ranks=2)
    assert node.progress().stopping
    (node.work / "seen").touch()
    code = node.wait()
    ended = node.termination()
    assert (code, ended.exit_class, ended.checkpoint_step) == (143, ExitClass.INTERRUPTED, 6)
    assert ended.message == "stopped from outside; the newest checkpoint is of step 6"


def test_a_hung_rank_gets_the_whole_grace_period_and_is_then_killed(tmp_path: Path) -> None:
    script = """
    if RANK == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.system("sleep 1000 &")
    beat.update(phase=Phase.TRAINING, step=5)
    while RANK == 0:
        time.sleep(1)
    until_stopped()
    end(ExitClass.INTERRUPTED)
    """
    node = Rig(tmp_path, script, grace_seconds=8).start()  # rank 1 needs a moment of it
    pids = [beat.pid for beat in node.wait_for_phase(Phase.TRAINING, ranks=2).ranks]
    started = time.monotonic()
    node.signal(signal.SIGTERM)
    code = node.wait()
    assert code == 143
    assert time.monotonic() - started >= 8.0
    assert node.termination().message == (
        "stopped from outside; rank(s) 0 did not end within the grace period and were killed;"
        " no checkpoint was written by this run"
    )
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    deadline = time.monotonic() + 60
    while _sessions(pids):  # the helper that rank 0 had started goes too: it was killed, and nobody waited for it
        assert time.monotonic() < deadline, _sessions(pids)
        time.sleep(0.02)


def test_the_grace_period_is_the_configured_one_not_the_30_seconds_of_torchrun(tmp_path: Path) -> None:
    node = Rig(tmp_path, "beat.update(phase=Phase.TRAINING)\nuntil_stopped()\nend(ExitClass.INTERRUPTED)").start()
    node.wait_for_phase(Phase.TRAINING)
    node.signal(signal.SIGTERM)
    node.wait()
    assert "the ranks have 20 s to write a checkpoint" in node.errors


def test_a_second_interrupt_kills_the_ranks_at_once(tmp_path: Path) -> None:
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nbeat.update(phase=Phase.TRAINING)\ntime.sleep(1000)"
    node = Rig(tmp_path, script, grace_seconds=600).start()
    node.wait_for_phase(Phase.TRAINING, ranks=2)
    node.signal(signal.SIGTERM)
    node.wait_for(lambda progress: progress.stopping, "the first signal is noticed")
    node.signal(signal.SIGINT)
    assert node.wait() == 143


def test_sigterm_while_preparing_ends_at_once(tmp_path: Path) -> None:
    node = Rig(tmp_path, "succeed()", environment={"PREPARE_SECONDS": "600"}).start()
    while not (node.work / "launcher.json").exists():
        time.sleep(0.05)
    node.signal(signal.SIGTERM)
    assert node.wait() == 143
    assert node.termination().message == ("stopped while the launcher was in phase FetchingModel; nothing is lost")


def test_ranks_die_with_their_launcher(tmp_path: Path) -> None:
    node = Rig(tmp_path, "beat.update(phase=Phase.TRAINING)\ntime.sleep(1000)").start()
    pids = [beat.pid for beat in node.wait_for_phase(Phase.TRAINING, ranks=2).ranks]
    node.signal(signal.SIGKILL)
    node.wait()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if _alive(pid)]


def test_orphans_of_ranks_are_collected(tmp_path: Path) -> None:
    script = """
    import subprocess
    subprocess.run(["sh", "-c", "sleep 0.3 & exit 0"])
    beat.update(phase=Phase.TRAINING)
    until_stopped()
    end(ExitClass.INTERRUPTED)
    """
    node = Rig(tmp_path, script).start()
    ranks = {beat.pid for beat in node.wait_for_phase(Phase.TRAINING, ranks=2).ranks}
    deadline = time.monotonic() + 60
    while _children(node.process.pid) != ranks and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _children(node.process.pid) == ranks
    node.signal(signal.SIGTERM)
    assert node.wait() == 143


def test_a_second_launcher_in_the_same_work_directory_is_refused(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "beat.update(phase=Phase.TRAINING)\nuntil_stopped()\nend(ExitClass.INTERRUPTED)", ranks=1)
    first = rig.start()
    progress = first.wait_for_phase(Phase.TRAINING)
    announced = (first.work / "launcher.json").read_text()
    second = rig.start()
    assert second.wait() == 10
    assert f"another launcher is running in {first.work}" in second.errors
    (first.work / "launcher.json").write_text(announced)  # the rig removes it before a start
    assert first.progress().pid == progress.pid
    first.signal(signal.SIGTERM)
    assert first.wait() == 143


def test_a_rank_without_a_last_word_is_told_by_its_exit_code(tmp_path: Path) -> None:
    script = "beat.update(phase=Phase.EVALUATING, step=12)\nprint('odd')\nos._exit(5)"
    code, node = Rig(tmp_path, script, ranks=1, max_restarts=0).run()
    ended = node.termination()
    assert (code, ended.exit_class) == (70, ExitClass.INTERNAL_ERROR)
    assert ended.message == "rank 0 exited with code 5 without saying why"
    assert (ended.step, ended.phase, ended.last_lines) == (12, Phase.EVALUATING, ("odd",))


def test_success_without_a_result_is_a_defect(tmp_path: Path) -> None:
    code, node = Rig(tmp_path, "end(ExitClass.COMPLETED)", ranks=1).run()
    assert (code, node.termination().message) == (
        70,
        "defect in the launcher: AssertionError: rank 0 reported success without writing result.json",
    )


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children(parent: int) -> set[int]:
    """Zombies too."""
    return {pid for pid, fields in _processes() if fields[1] == str(parent)}


def _sessions(leaders: list[int]) -> list[int]:
    return [pid for pid, fields in _processes() if int(fields[3]) in leaders and fields[0] != "Z"]


def _processes() -> list[tuple[int, list[str]]]:
    """(pid, fields of /proc/<pid>/stat after the name: state, parent, group, session, ...)."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.append((int(name), Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
