"""What a launcher says at the end: classes, the guilty rank, 4 KiB, no secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.unit.trainer.launcher_rig import plan

from finetune_api.errors import SpecError, StorageError
from finetune_api.exits import ExitClass
from finetune_api.report import EndedAttempt, Heartbeat, JobResult, Phase, RankEnd, Termination
from finetune_trainer import progress, termination
from finetune_trainer.container import out_of_memory_kills
from finetune_trainer.failures import Failure, Outcome, classify, guilty, last_lines
from finetune_trainer.launcher import read_config
from finetune_trainer.progress import HeartbeatWriter
from finetune_trainer.rank_environment import host_of, is_loopback, port_of, rank_environment
from finetune_trainer.ranks import RankProcess

LIMIT = 4096


def failure(rank: int, exit_class: ExitClass, ended_at: float = 0.0, message: str = "broken") -> Failure:
    return Failure(rank=rank, node_rank=0, exit_class=exit_class, message=message, ended_at=ended_at)


def ended(code: int, log: Path) -> RankProcess:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return RankProcess(1, 1, process, log, exit_code=code, ended_at=5.0)


@pytest.mark.parametrize(
    ("others", "first"),
    [
        (ExitClass.COMMUNICATION_FAILED, ExitClass.RANK_KILLED),
        (ExitClass.COMMUNICATION_FAILED, ExitClass.INTERNAL_ERROR),
        (ExitClass.INTERNAL_ERROR, ExitClass.RANK_KILLED),
        (ExitClass.INTERRUPTED, ExitClass.NUMERICAL_ERROR),
        (ExitClass.COMMUNICATION_FAILED, ExitClass.OUT_OF_MEMORY),
    ],
)
def test_the_cause_is_guilty_even_when_its_echo_came_first(others: ExitClass, first: ExitClass) -> None:
    assert guilty([failure(0, others, 1.0), failure(1, first, 2.0)]).rank == 1


def test_of_two_causes_the_earlier_is_guilty() -> None:
    assert guilty([failure(0, ExitClass.INVALID_DATA, 2.0), failure(1, ExitClass.INVALID_DATA, 1.0)]).rank == 1


def test_sigkill_with_an_oom_kill_of_the_container_is_out_of_memory(tmp_path: Path) -> None:
    killed = ended(-signal.SIGKILL, tmp_path / "rank-1.log")
    assert classify(killed, None, 0, out_of_memory_kills=1).exit_class is ExitClass.OUT_OF_MEMORY
    assert classify(killed, None, 0, out_of_memory_kills=0).exit_class is ExitClass.RANK_KILLED


def test_the_rank_s_own_word_wins_over_its_exit_code(tmp_path: Path) -> None:
    said = RankEnd(rank=1, exit_class=ExitClass.OUT_OF_MEMORY, step=3, phase=Phase.TRAINING, message="CUDA: no memory")
    judged = classify(ended(1, tmp_path / "log"), said, 0, 0)
    assert (judged.exit_class, judged.message, judged.step) == (ExitClass.OUT_OF_MEMORY, "CUDA: no memory", 3)


def test_oom_kills_are_read_from_both_versions_of_control_groups(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/job\n")
    (tmp_path / "pod/job").mkdir(parents=True)
    (tmp_path / "pod/job/memory.events").write_text("low 0\noom 2\noom_kill 2\noom_group_kill 0\n")
    assert out_of_memory_kills(tmp_path, membership) == 2
    membership.write_text("11:cpu:/x\n7:memory:/pod/old\n")
    (tmp_path / "memory/pod/old").mkdir(parents=True)
    (tmp_path / "memory/pod/old/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert out_of_memory_kills(tmp_path, membership) == 3
    assert out_of_memory_kills(tmp_path / "nowhere", tmp_path / "nothing") is None


def test_last_lines_are_without_colours_and_redrawn_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\x1b[31mred\x1b[0m\n\n 10%\r 50%\r100%\nlast \xff\n")
    assert last_lines(log) == ("red", "100%", "last �")
    assert last_lines(log, 1) == ("last �",)
    assert last_lines(tmp_path / "absent") == ()


def huge(**more: object) -> Termination:
    content = {"exitClass": "InvalidData", "exitCode": 11, "message": "m" * 9000, "hint": "é" * 9000, **more}
    return Termination.model_validate(content)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_termination_message_never_exceeds_4_kib(count: int) -> None:
    text = termination.encode(huge(lastLines=["\x00é" * 4000] * count, plan=plan(1, 2), exception="E" * 5000), {})
    assert len(text) <= LIMIT
    back = Termination.model_validate_json(text)
    assert (back.exit_class, back.exit_code, back.plan) == (ExitClass.INVALID_DATA, 11, None)
    assert back.message.startswith("mmmm")


def test_the_plan_goes_first_then_the_oldest_lines() -> None:
    lines = [f"line {number:03d} " + "x" * 150 for number in range(40)]
    small = Termination(exit_class=ExitClass.INVALID_DATA, exit_code=11, message="short", plan=plan(1, 2))
    assert Termination.model_validate_json(termination.encode(small, {})).plan == plan(1, 2)
    large = small.model_copy(update={"last_lines": tuple(lines)})
    back = Termination.model_validate_json(termination.encode(large, {}))
    assert back.plan is None
    assert back.message == "short"
    assert back.last_lines == tuple(lines)[-len(back.last_lines) :]
    assert len(back.last_lines) >= 20


def test_earlier_attempts_go_before_the_last_five_lines_and_the_newest_one_stays() -> None:
    attempts = tuple(
        EndedAttempt(gang=f"{number:08x}", number=number, exit_class=ExitClass.RANK_KILLED, message="m" * 200)
        for number in range(1, 6)
    )
    lines = tuple(f"line {number:03d} " + "x" * 600 for number in range(20))
    said = Termination(
        exit_class=ExitClass.INVALID_DATA,
        exit_code=11,
        message="short",
        last_lines=lines,
        ended=attempts,
        gang="00000005",
    )
    back = Termination.model_validate_json(termination.encode(said, {}))
    assert (back.message, back.gang, back.last_lines) == ("short", "00000005", lines[-5:])
    assert back.ended == attempts[-len(back.ended) :]
    assert len(back.ended) >= 1


def test_values_of_secret_variables_do_not_appear() -> None:
    environment = {"AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI", "HF_TOKEN": "hf_abcdefgh", "HOME": "/root/long/enough"}
    said = Termination(
        exit_class=ExitClass.STORAGE_REFUSED,
        exit_code=16,
        message="key wJalrXUtnFEMI refused in /root/long/enough",
        last_lines=("token=hf_abcdefgh",),
    )
    back = Termination.model_validate_json(termination.encode(said, environment))
    assert back.message == "key *** refused in /root/long/enough"
    assert back.last_lines == ("token=***",)


def test_an_interruption_names_the_newest_checkpoint_and_what_failed_meanwhile() -> None:
    beats = {
        rank: Heartbeat(rank=rank, local_rank=rank, pid=1, phase=Phase.TRAINING, checkpoint_step=step)
        for rank, step in ((0, 40), (1, None))
    }
    outcome = Outcome(ExitClass.INTERRUPTED, guilty=failure(1, ExitClass.STORAGE_UNAVAILABLE, message="bucket away"))
    said = termination.failed(outcome, None, beats)
    assert (said.exit_code, said.checkpoint_step) == (143, 40)
    assert said.message == (
        "stopped from outside; rank 1 failed while stopping (bucket away); the newest checkpoint is of step 40"
    )


def test_errors_of_the_launcher_keep_their_class() -> None:
    refused = termination.refused(StorageError("no such bucket", "create it"))
    assert (refused.exit_code, refused.message, refused.hint) == (16, "no such bucket", "create it")
    defect = termination.refused(KeyError("x"))
    assert (defect.exit_code, defect.exception) == (70, "KeyError")


def test_a_broken_configuration_lists_every_problem_and_exits_10(tmp_path: Path) -> None:
    config = tmp_path / "trainer.json"
    config.write_text(json.dumps({"job": {"name": "x"}, "metricsPort": 99999}))
    with pytest.raises(SpecError) as caught:
        read_config(config)
    assert {problem.path for problem in caught.value.problems} >= {"job.uid", "metricsPort", "spec", "plan"}
    ended = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", "--config", config],
        env={**os.environ, "FINETUNE_TERMINATION_PATH": str(tmp_path / "message")},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == 10
    assert f"metricsPort: Input should be less than or equal to 65535 (99999); correct {config}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert Termination.model_validate_json((tmp_path / "message").read_bytes()).exit_class is ExitClass.INVALID_SPEC


def test_a_missing_configuration_is_told_in_a_sentence(tmp_path: Path) -> None:
    absent = tmp_path / "absent.json"
    with pytest.raises(SpecError) as caught:
        read_config(absent)
    expected = f"{absent}: cannot be read (No such file or directory); name the TrainerConfig with --config"
    assert str(caught.value) == expected


def test_heartbeats_are_written_ten_times_a_second_and_at_every_change_of_phase(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 3, 1, writes_per_second=0.001)
    writer.update(step=1, phase=Phase.TRAINING)
    assert progress.read_heartbeats(tmp_path)[3].step == 1
    writer.update(step=2, step_seconds=0.2, loss=float("nan"))
    assert progress.read_heartbeats(tmp_path)[3].step == 1  # not yet
    writer.update(phase=Phase.EVALUATING)
    beat = progress.read_heartbeats(tmp_path)[3]
    assert (beat.step, beat.loss, beat.local_rank) == (2, None, 1)
    assert (sum(beat.step_seconds_counts), beat.step_seconds_sum) == (1, 0.2)


def test_an_end_file_carries_the_last_heartbeat_along(tmp_path: Path) -> None:
    writer = HeartbeatWriter(tmp_path, 0, 0, writes_per_second=0.001)
    writer.update(step=7)
    writer.end(RankEnd(rank=0, exit_class=ExitClass.COMPLETED, step=7, phase=Phase.DONE))
    assert progress.read_heartbeats(tmp_path)[0].step == 7
    assert progress.read_ends(tmp_path)[0].exit_class is ExitClass.COMPLETED
    progress.clear(tmp_path)
    assert (progress.read_heartbeats(tmp_path), progress.read_ends(tmp_path)) == ({}, {})


def test_ranks_on_cpu_see_no_accelerator_and_share_the_processors() -> None:
    found = rank_environment("cpu", 10_000, "127.0.0.1:29500", {"CUDA_VISIBLE_DEVICES": "0", "MY": "1"})
    assert (found["DS_ACCELERATOR"], found["CUDA_VISIBLE_DEVICES"], found["MY"]) == ("cpu", "", "1")
    assert (found["OMP_NUM_THREADS"], found["HF_HUB_OFFLINE"], found["GLOO_SOCKET_IFNAME"]) == ("1", "1", "lo")
    assert rank_environment("cpu", 1, "pod-0.job:29500", {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    assert "GLOO_SOCKET_IFNAME" not in rank_environment("cpu", 1, "pod-0.job:29500", {})
    assert "DS_ACCELERATOR" not in rank_environment("cuda", 1, "127.0.0.1:29500", {})


def test_endpoints_are_taken_apart() -> None:
    assert (host_of("[::1]:29500"), port_of("[::1]:29500")) == ("::1", 29500)
    assert [is_loopback(host) for host in ("::1", "127.3.2.1", "localhost", "10.0.0.1", "pod-0")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_result_of_rank_0_becomes_the_message() -> None:
    result = JobResult(
        artifact_uri="s3://b/x/",
        artifact_manifest_sha256="a" * 64,
        artifact_files=2,
        artifact_bytes=10,
        report_uri="s3://b/x/report.html",
        report_directory="/w/report",
        metrics={"trainLoss": 1.0},
        step=12,
    )
    said = termination.completed(result, plan(1, 1))
    assert (said.exit_code, said.message) == (0, "completed after 12 steps: 2 files at s3://b/x/")
