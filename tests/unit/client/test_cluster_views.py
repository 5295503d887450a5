"""What the cluster commands print of statuses as the operator writes them."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from tests.unit.client.jobs import NOW, SHA256, at, complete, condition, failed, make_job, plan, raw_job, running
from urllib3 import HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError, ReadTimeoutError

from finetune.cluster import rank_log
from finetune.cluster.api import Cluster
from finetune.cluster.errors import ClusterError, reason_of
from finetune.cluster.first_error import FirstError, first_error_screen, guilty_pod
from finetune.cluster.follow import result_of, snapshot_of
from finetune.cluster.job import read_job_object, read_status
from finetune.cluster.kubeconfig import Connection
from finetune.cluster.list_view import list_screen
from finetune.cluster.logs import Position, new_lines, node_of_rank
from finetune.cluster.pod_exec import open_exec
from finetune.cluster.pods import TrainerPod, trainer_pods
from finetune.cluster.status_view import EventLine, status_screen
from finetune.cluster.tables import short_duration
from finetune.cluster.wait import parse_target
from finetune.durations import parse_duration
from finetune.progress_view import LineView
from finetune_api.exits import ExitClass
from finetune_api.report import Phase, Termination
from finetune_api.status import FineTuneJobStatus, StatusAttempt, StatusRestarts


def test_the_list_is_a_table_as_kubectl_prints_it() -> None:
    jobs = [make_job(running()), make_job(complete(), "support-bot"), make_job(None, "new")]
    assert list_screen(jobs, NOW).splitlines() == [
        "NAME          STATE      STEP   TOTAL   LOSS   ETA   METHOD   NODES   AGE",
        "bot           Running    420    1170    1.31   38m   QLoRA    2       30m",
        "support-bot   Complete   1170   1170    1.31         QLoRA    2       30m",
        "new           Unseen                                 QLoRA    2       30m",
    ]


def test_the_list_of_all_namespaces_names_them() -> None:
    assert list_screen([make_job(running())], NOW, everywhere=True).splitlines()[1].startswith("team        bot    ")


def test_the_status_of_a_running_job_is_one_screen() -> None:
    events = [EventLine(NOW, "Normal", "Restarted", "attempt 2 starts from step 200", 2)]
    assert status_screen(make_job(running()), events, NOW) == "\n".join(
        (
            "team/bot   Running   created 30m ago",
            "step 420 of 1170, loss 1.31, 2,913 tokens/s, about 38 min left",
            "",
            "  [###########-------------------] step 420/1170 (36 %), epoch 1.08, loss 1.31, 2,913 tokens/s,"
            " about 38 min 00 s left",
            "  as of 4s ago",
            "",
            "  checkpoint    step 400, 90s ago, s3://adapters/bot/checkpoints/step-00000400/",
            "",
            "plan",
            "  runs on       4 ranks (2 nodes x 2)",
            "  strategy      FSDP full shard, method QLoRA",
            "  batch         8 per step = 2 per forward x 1 accumulated x 4 ranks",
            "  steps         1170",
            "  chosen for you",
            "    training.microBatchSize    2     the largest that fits",
            "    distributed.strategy.type  FSDP  several ranks share one model",
            "",
            "attempts",
            "  #   STARTED   RAN   FROM STEP   LAST STEP   LOST   CAUSE        EXIT   MESSAGE",
            "  1   25m ago   10m   0           217         17     RankKilled   31     rank 3 was killed by SIGKILL"
            " (pod ftj-bot-1-abcde on node n2)",
            "  2   14m ago   14m   200                            running",
            "",
            "conditions",
            "  TYPE       STATUS   REASON     AGE   MESSAGE",
            "  Accepted   True     Accepted   60s",
            "  Running    True     Training   60s   all ranks train",
            "",
            "events",
            "  AGE   TYPE     REASON      MESSAGE",
            "  0s    Normal   Restarted   attempt 2 starts from step 200 (x2)",
        )
    )


def test_the_status_of_a_complete_job_names_its_artifact_and_metrics() -> None:
    lines = status_screen(make_job(complete()), [], NOW).splitlines()
    assert lines[5:8] == [
        "  artifact      s3://adapters/bot/",
        f"                3 files, 32.0 MiB, manifest sha256 {SHA256}",
        "  metrics       trainLoss 1.12, validationLoss 1.20",
    ]
    assert not [line for line in lines if "left" in line or "as of" in line]


def test_a_long_ledger_says_how_many_attempts_it_no_longer_lists_and_what_ended_them() -> None:
    restarts = (StatusRestarts(cause="RankKilled", count=20), StatusRestarts(cause="Evicted", count=3))
    lines = status_screen(make_job(running(total_attempts=24, restarts=restarts)), [], NOW).splitlines()
    assert "attempts (the last 2 of 24; ended by RankKilled 20, Evicted 3)" in lines


def test_a_pending_job_says_what_it_waits_for() -> None:
    message = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu"
    lines = status_screen(make_job(FineTuneJobStatus(state="Pending", message=message)), [], NOW).splitlines()
    assert lines[:2] == ["team/bot   Pending   created 30m ago", message]


def test_every_problem_of_an_invalid_job_stands_on_its_own_line() -> None:
    status = FineTuneJobStatus(state="Invalid", message="spec.a: is wrong; mend it\nspec.b: is wrong; mend it")
    assert status_screen(make_job(status), [], NOW).splitlines()[1:3] == [
        "spec.a: is wrong; mend it",
        "spec.b: is wrong; mend it",
    ]


def test_a_job_that_no_operator_has_seen_says_so() -> None:
    assert status_screen(make_job(), [], NOW).splitlines()[:2] == [
        "team/bot   Unseen   created 30m ago",
        "no operator has looked at it yet",
    ]


def test_long_reasons_are_wrapped_below_themselves() -> None:
    decision = {"field": "a", "value": "b", "reason": "word " * 60}
    status = running(plan=plan(decisions=(decision,)))
    lines = status_screen(make_job(status), [], NOW).splitlines()
    first = lines.index("  chosen for you") + 1
    assert lines[first].startswith("    a  b  word word")
    assert lines[first + 1].startswith("          word word")
    assert max(map(len, lines[first : first + 3])) <= 120


def test_a_status_of_a_newer_operator_is_read_as_far_as_it_is_known() -> None:
    raw = raw_job(running())["status"]
    raw |= {"future": {"a": 1}, "totalAttempts": "many"}
    raw["attempts"][0]["future"] = True
    raw["conditions"] += [{"type": "Future"}, {"type": "Other", "future": 1}]
    assert read_status(raw) == running(total_attempts=None)


def test_the_bar_of_a_cluster_job_is_that_of_a_local_run() -> None:
    stream = io.StringIO()
    view = LineView(stream)
    waiting = FineTuneJobStatus(state="Pending", message="waiting for 2 pods")
    for status in (None, waiting, running()):
        view.show(snapshot_of(make_job(status)))
    assert stream.getvalue().splitlines() == [
        "waiting for the operator: no operator has looked at it yet",
        "pending: waiting for 2 pods",
        "training (attempt 2), step 420/1170, loss 1.31, 2,913 tokens/s, about 38 min 00 s left",
    ]


def test_the_result_of_a_complete_job_is_that_of_a_local_run() -> None:
    result = result_of(make_job(complete()))
    assert result.model_dump(mode="json", by_alias=True, exclude_none=True) == {
        "state": "Completed",
        "exitClass": "Completed",
        "message": "completed after 1170 steps",
        "hint": "",
        "step": 1170,
        "artifacts": {"uri": "s3://adapters/bot/", "manifestSha256": SHA256, "files": 3, "bytes": 33554432},
        "metrics": {"trainLoss": 1.12, "validationLoss": 1.2},
        "job": "team/bot",
        "lastLines": [],
    }


@pytest.mark.parametrize(
    ("status", "ended", "exit_class"),
    [
        (complete(), "Complete", ExitClass.COMPLETED),
        (failed(), "Failed", ExitClass.INVALID_DATA),
        (failed("DeadlineExceeded"), "Failed", ExitClass.INTERNAL_ERROR),
        (
            failed("RestartsExhausted").model_copy(
                update={"attempts": (StatusAttempt(number=1, exit_code=31), StatusAttempt(number=2, exit_code=33))}
            ),
            "Failed",
            ExitClass.COMMUNICATION_FAILED,
        ),
        (FineTuneJobStatus(conditions=(condition("Accepted", "False"),)), "Invalid", ExitClass.INVALID_SPEC),
        (running(), None, ExitClass.RANK_KILLED),
    ],
)
def test_how_a_job_ended_follows_from_its_conditions(
    status: FineTuneJobStatus, ended: str | None, exit_class: ExitClass
) -> None:
    job = make_job(status)
    assert (job.ended, job.exit_class) == (ended, exit_class)


def test_a_condition_of_an_older_spec_does_not_count() -> None:
    raw = raw_job(running())
    assert read_job_object(raw).holds("running")
    raw["metadata"]["generation"] = 2
    assert not read_job_object(raw).holds("Running")


def test_a_job_whose_spec_was_mended_is_not_invalid_any_more() -> None:
    raw = raw_job(FineTuneJobStatus(state="Invalid", message="no", conditions=(condition("Accepted", "False"),)))
    assert read_job_object(raw).ended == "Invalid"
    raw["metadata"]["generation"] = 2
    assert read_job_object(raw).ended is None


def test_a_running_job_whose_spec_the_operator_cannot_read_after_a_rollback_has_not_ended() -> None:
    assert make_job(running(conditions=(condition("Accepted", "False"), condition("Running")))).ended is None


def test_what_has_ended_for_good_stays_so_whatever_becomes_of_the_spec() -> None:
    assert [make_job(status, generation=2).ended for status in (complete(), failed())] == ["Complete", "Failed"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5s"), (119, "119s"), (130, "2m10s"), (3000, "50m"), (13_000, "3h36m"), (100_000, "27h"), (3e6, "34d")],
)
def test_ages_are_those_of_kubectl(seconds: float, text: str) -> None:
    assert short_duration(seconds) == text


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h30m", 5400), ("2d", 172_800)])
def test_durations_are_read_as_kubectl_reads_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "1h30", "-5s", "5 s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^.*$"):
        parse_duration(text)


def test_a_condition_to_wait_for_is_known_in_any_case_and_as_kubectl_writes_it() -> None:
    assert [parse_target(text) for text in ("complete", "condition=Running", "DELETED")] == [
        "Complete",
        "Running",
        "Deleted",
    ]
    with pytest.raises(ClusterError) as caught:
        parse_target("Completed")
    assert (str(caught.value), caught.value.hint) == (
        "'Completed' is nothing a job can be waited for",
        "did you mean Complete?",
    )


def test_a_rank_is_found_on_its_node() -> None:
    job = make_job(running())
    assert [node_of_rank(job, rank) for rank in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ClusterError) as caught:
        node_of_rank(job, 4)
    assert (str(caught.value), caught.value.hint) == ("the FineTuneJob 'bot' has no rank 4", "its ranks are 0 to 3")


def test_lines_that_a_resumed_stream_repeats_are_left_out() -> None:
    position = Position()
    first = ["2026-11-21T12:00:00.1Z a", "2026-11-21T12:00:00.2Z b", "2026-11-21T12:00:00.2Z c"]
    assert list(new_lines(iter(first), position, pytest.fail)) == ["a", "b", "c"]
    again = [*first[1:], "2026-11-21T12:00:00.2Z d", "2026-11-21T12:00:00.3Z "]
    assert list(new_lines(iter(again), position, pytest.fail)) == ["d", ""]


def test_a_line_of_the_kubelet_itself_is_said_once_and_hides_no_output() -> None:
    position, said = Position(), []
    trouble = "failed to create fsnotify watcher: too many open files"
    first = ["2026-11-21T12:00:00.1Z a", trouble, ""]
    assert list(new_lines(iter(first), position, said.append)) == ["a"]
    again = [first[0], "2026-11-21T12:00:00.2Z b", trouble, "2026-11-21T12:00:00.3Z c"]
    assert list(new_lines(iter(again), position, said.append)) == ["b", "c"]
    assert said == [f"the kubelet says: {trouble}"]
    assert position.stamp == "2026-11-21T12:00:00.3Z"


def test_a_connection_for_exec_that_nobody_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.cluster.pod_exec.ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = client.Configuration(host=f"http://127.0.0.1:{silent.getsockname()[1]}")
        cluster = Cluster(Connection(client.ApiClient(settings), "team", "test"))
        with pytest.raises(ApiException) as caught:
            open_exec(cluster, "ftj-bot-1-abcde", "trainer", ["python"])
    assert (caught.value.status, reason_of(caught.value)) == (0, "Connection timed out")


def silence() -> MaxRetryError:
    pool = HTTPSConnectionPool("cluster")
    return MaxRetryError(pool, "/log", ReadTimeoutError(pool, "/log", "Read timed out. (read timeout=30.0)"))


def test_a_pod_that_says_nothing_for_long_can_be_read_all_the_same() -> None:
    position = Position(stamp="2026-11-21T12:00:00.1Z")
    position.answer()
    position.fail(silence(), followed=True)
    assert (position.failures, position.refusals) == (0, 0)
    unheard = Position()  # a kubelet answers with the first line: there may be none yet
    unheard.fail(silence(), followed=True)
    assert (unheard.failures, unheard.refusals) == (1, 0)


def test_a_kubelet_that_does_not_repeat_what_is_known_does_not_answer() -> None:
    position = Position(stamp="2026-11-21T12:00:00.1Z")
    for _ in range(2):
        position.fail(silence(), followed=True)
    assert (position.failures, position.refusals) == (2, 2)
    position.answer()
    assert position.refusals == 0
    position.answered = False
    position.fail(ApiException(status=0, reason="Handshake status 502 Bad Gateway -+-+- {} -+-+- b''"), followed=True)
    assert (position.refusals, position.trouble) == (1, "Handshake status 502 Bad Gateway")


def pod(name: str, termination: Termination | None, exit_code: int = 33, index: int = 0) -> TrainerPod:
    return TrainerPod(
        name=name,
        uid=name,
        index=index,
        created=NOW,
        phase="Failed",
        node="n1",
        started=True,
        ended=True,
        exit_code=exit_code,
        deleting=False,
        waiting="",
        reason="",
        termination=termination,
    )


def test_the_last_word_of_a_newer_trainer_is_understood_as_far_as_it_goes() -> None:
    message = '{"exitClass":"InvalidData","exitCode":11,"message":"line 3 is not JSON","mood":"good"}'
    terminated = client.V1ContainerStateTerminated(exit_code=11, message=message)
    state = client.V1ContainerState(terminated=terminated)
    container = client.V1ContainerStatus(
        name="trainer", ready=False, restart_count=0, image="", image_id="", state=state
    )
    metadata = client.V1ObjectMeta(name="p", uid="u", labels={"batch.kubernetes.io/job-completion-index": "0"})
    metadata.creation_timestamp = NOW
    seen = client.V1Pod(
        metadata=metadata,
        spec=client.V1PodSpec(containers=[client.V1Container(name="trainer")]),
        status=client.V1PodStatus(phase="Failed", container_statuses=[container]),
    )
    (read,) = trainer_pods([seen])
    assert read.termination is not None
    assert (read.termination.exit_class, read.termination.message) == (ExitClass.INVALID_DATA, "line 3 is not JSON")


def ended(exit_class: ExitClass, gang: str = "g2", **fields: object) -> Termination:
    return Termination(
        exit_class=exit_class, exit_code=exit_class.code, message=f"it was {exit_class.value}", gang=gang, **fields
    )


def test_the_guilty_pod_is_the_one_that_knows_the_cause_not_an_echo() -> None:
    echo = pod("echo", ended(ExitClass.COMMUNICATION_FAILED))
    cause = pod("cause", ended(ExitClass.INVALID_DATA), exit_code=11, index=1)
    assert guilty_pod([cause, echo], None) is cause
    assert guilty_pod([pod("fine", ended(ExitClass.COMPLETED), exit_code=0)], None) is None


def test_the_ledger_decides_which_pod_is_guilty() -> None:
    echo, cause = pod("echo", ended(ExitClass.COMMUNICATION_FAILED)), pod("cause", None, exit_code=137)
    assert guilty_pod([echo, cause], StatusAttempt(number=1, cause="RankKilled", pod="cause")) is cause


def test_the_first_error_names_attempt_step_phase_rank_pod_and_last_lines() -> None:
    termination = ended(
        ExitClass.OUT_OF_MEMORY, hint="lower training.microBatchSize", guilty_rank=3, step=7, phase=Phase.TRAINING
    )
    attempt = StatusAttempt(number=2, cause="OutOfMemory", ended_at=at(5))
    error = FirstError(attempt, "ftj-bot-1-abcde", "n2", termination, ("allocating", "killed"))
    assert first_error_screen("bot", error).splitlines() == [
        "bot: attempt 2 failed at step 7 in phase Training on rank 3 in pod ftj-bot-1-abcde on node n2",
        "OutOfMemory: it was OutOfMemory; lower training.microBatchSize",
        "  rank 3 | allocating",
        "  rank 3 | killed",
    ]


def test_of_a_pod_that_is_gone_the_ledger_tells() -> None:
    attempt = StatusAttempt(number=1, cause="NodeLost", last_step=41, message="node n2 was lost")
    assert first_error_screen("bot", FirstError(attempt, "", "", None)).splitlines() == [
        "bot: attempt 1 failed at step 41",
        "NodeLost: node n2 was lost",
        "its pod is gone and the output with it",
    ]


def test_the_program_that_reads_a_rank_s_files_prints_every_start_and_skips_what_is_known(tmp_path: Path) -> None:
    for attempt, text in ((2, "second\n"), (10, "tenth\n"), (1, "first\n")):
        (tmp_path / f"attempt-{attempt}").mkdir()
        (tmp_path / f"attempt-{attempt}" / "rank-3.log").write_text(text)
    (tmp_path / "attempt-1" / "rank-2.log").write_text("other\n")
    program = Path(rank_log.__file__).read_text(encoding="utf-8")

    def read(skip: int) -> str:
        command = [sys.executable, "-I", "-c", program, str(tmp_path), "3", str(skip), "once"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert read(0) == "first\nsecond\ntenth\n"
    assert read(6 + 3) == "ond\ntenth\n"


def test_the_program_that_reads_a_rank_s_files_follows_them(tmp_path: Path) -> None:
    program = Path(rank_log.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-I", "-u", "-c", program, str(tmp_path), "1", "0", "follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reading:
        assert reading.stdout is not None
        try:
            for attempt in (1, 2):
                (tmp_path / f"attempt-{attempt}").mkdir()
                with (tmp_path / f"attempt-{attempt}" / "rank-1.log").open("w") as log:
                    for line in ("one\n", "two\n"):
                        log.write(line)
                        log.flush()
                        assert reading.stdout.readline() == line
        finally:
            reading.kill()
