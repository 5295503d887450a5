"""From what is seen to the exact status: states, messages, conditions, events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.job_life import (
    SETTINGS,
    START,
    URI,
    Life,
    at,
    dead,
    job,
    new_pod,
    over,
    page,
    plan,
    pod,
    said,
    text,
)

from finetune_api.errors import Problem
from finetune_api.exits import ExitClass
from finetune_api.report import Phase, Termination
from finetune_operator.derive import derive, derive_invalid, dump, is_settled, seconds_to_live, wants_pods
from finetune_operator.observe import Observed, PodView
from finetune_operator.verdict import DeletePod, DeleteResource, StopJob


def published() -> Termination:
    return said(
        ExitClass.COMPLETED,
        "completed after 100 steps",
        step=100,
        artifact_uri=URI,
        artifact_manifest_sha256="a" * 64,
        artifact_files=3,
        artifact_bytes=1234,
        metrics={"trainLoss": 1.25, "validationLoss": 1.5},
        gang="g1",
    )


def test_the_first_look_says_pending_and_nothing_else() -> None:
    life = Life()
    verdict = life.look(0, job())
    assert life.status == {
        "observedGeneration": 1,
        "state": "Pending",
        "message": "waiting for 2 pods to start",
        "plan": {
            "worldSize": 2,
            "nodes": 2,
            "strategy": "FSDP full shard",
            "microBatchSize": 1,
            "gradientAccumulationSteps": 1,
            "decisions": [],
            "warnings": [],
        },
        "attempts": [],
        "restarts": [],
        "conditions": [
            {
                "type": "Accepted",
                "status": "True",
                "reason": "Accepted",
                "message": "the spec is valid",
                "observedGeneration": 1,
                "lastTransitionTime": text(0),
            },
            {
                "type": "PodsReady",
                "status": "False",
                "reason": "PodsStarting",
                "message": "waiting for 2 pods to start",
                "observedGeneration": 1,
                "lastTransitionTime": text(0),
            },
            {
                "type": "Running",
                "status": "False",
                "reason": "Pending",
                "message": "waiting for 2 pods to start",
                "observedGeneration": 1,
                "lastTransitionTime": text(0),
            },
            {
                "type": "Reconciling",
                "status": "True",
                "reason": "Pending",
                "message": "waiting for 2 pods to start",
                "observedGeneration": 1,
                "lastTransitionTime": text(0),
            },
        ],
    }
    assert (verdict.events, verdict.commands, verdict.look_again_seconds) == ((), (), 3.0)


def test_ready_pods_make_it_running_without_a_look_at_them() -> None:
    life = Life()
    life.look(0, job())
    assert not wants_pods(life.resource, job(), at(1))
    assert not wants_pods(life.resource, job(ready=2), at(4))
    verdict = life.look(2, job(ready=2))
    assert (life.status["state"], life.status["message"]) == ("Running", "2 pods run; the launchers prepare")
    assert life.told == ["Running: runs: FSDP full shard, QLoRA, world size 2 on 2 pods"]
    assert life.condition("PodsReady") == ("True", "Ready", "2 pods are ready")
    assert life.condition("Running") == ("True", "Running", "attempt 1 of the ranks runs on 2 pods")
    assert verdict.look_again_seconds == 2.0
    assert life.attempts("number", "startedAt", "endedAt") == [(1, text(2), None)]


@pytest.mark.parametrize(
    ("changes", "seconds", "wanted"),
    [
        ({}, 2.9, False),
        ({}, 3, True),
        ({"ready": 1}, 4, True),
        ({"ready": 2}, 60, False),
        ({"failed": 1}, 1, True),
        ({"terminating": 1}, 1, True),
        ({"complete": True}, 1, True),
        ({"failure": ("PodFailurePolicy", "x")}, 1, True),
        ({"suspended": True}, 1, True),
    ],
)
def test_pods_are_listed_only_when_something_is_unusual(
    changes: dict[str, object], seconds: float, wanted: bool
) -> None:
    life = Life()
    life.look(0, job())
    assert wants_pods(life.resource, job(**changes), at(seconds)) is wanted


def test_pods_are_listed_when_progress_is_due_or_one_of_them_is_missing() -> None:
    life = Life()
    life.run()
    assert not wants_pods(life.resource, job(ready=2), at(19))
    assert wants_pods(life.resource, job(ready=2), at(20))
    assert wants_pods(life.resource, job(ready=1), at(11))
    assert not wants_pods(life.resource, job(ready=2), at(12), interval_seconds=30)
    assert not wants_pods(life.resource, None, at(60))


def test_progress_becomes_numbers_and_a_sentence() -> None:
    life = Life()
    life.run()
    pages = [
        page(0, step=42, loss=1.3125, learning_rate=1.6e-4, tokens_per_second=2913.4, epoch=1.08, validation_loss=1.5,
             step_seconds_counts=(0, 4), step_seconds_sum=160.0, checkpoint_step=40, checkpoint_uri=f"{URI}c/40/",
             checkpoint_saved_at=at(50).timestamp()),
        page(1, step=42),
    ]  # fmt: skip
    verdict = life.look(60, job(ready=2), [pod(0), pod(1)], pages)
    assert life.status["message"] == "step 42 of 100, loss 1.312, 2,913 tokens/s, about 39 min left"
    assert life.status["progress"] == {
        "phase": "Training",
        "step": 42,
        "totalSteps": 100,
        "epoch": "1.08",
        "loss": "1.312",
        "validationLoss": "1.5",
        "learningRate": "0.00016",
        "tokensPerSecond": 2913,
        "etaSeconds": 2320,
        "updatedAt": text(60),
    }
    assert life.status["checkpoint"] == {"step": 40, "uri": f"{URI}c/40/", "savedAt": text(50)}
    assert verdict.look_again_seconds == 10.0


def test_progress_is_written_once_per_interval_and_not_at_all_when_nothing_else_changed() -> None:
    life = Life()
    life.run()
    before = life.status
    life.look(19, job(ready=2), [pod(0), pod(1)], [page(0, step=30), page(1, step=30)])
    assert life.status == before
    life.look(20, job(ready=2), [pod(0), pod(1)], [page(0, step=30), page(1, step=30)])
    assert life.status["progress"]["step"] == 30


def test_between_attempts_too_progress_is_written_once_per_interval() -> None:
    life = Life()
    life.run()
    pods = [pod(0), dead(pod(1), 20, 137)]
    meeting = page(0, "", phase=Phase.RENDEZVOUS)
    life.look(21, job(ready=1, failed=1), pods, [meeting])
    before = life.status
    assert before["progress"]["updatedAt"] == text(21)
    life.look(26, job(ready=1, failed=1), pods, [meeting])
    assert life.status == before
    life.look(31, job(ready=1, failed=1), pods, [meeting])
    assert life.status["progress"]["updatedAt"] == text(31)


def test_while_the_ranks_load_again_the_last_numbers_stand() -> None:
    life = Life()
    life.run()
    life.look(21, job(ready=2), [pod(0), pod(1)], [page(n, step=30, loss=1.5) for n in (0, 1)])
    ended = (over("g1", ExitClass.RANK_KILLED, 22, "rank 0 was killed by SIGKILL", last_step=31),)
    loading = [page(n, "g2", 0, Phase.LOADING_MODEL, ended=ended) for n in (0, 1)]
    life.look(31, job(ready=2), [pod(0), pod(1)], loading)
    assert life.status["progress"] == {
        "phase": "LoadingModel", "step": 30, "totalSteps": 100, "epoch": "0", "loss": "1.5", "updatedAt": text(31),
    }  # fmt: skip
    life.look(33, job(ready=1), [pod(0)], [])
    assert life.attempts("number", "cause", "lastStep") == [(1, "RankKilled", 31), (2, "PodDeleted", None)]
    again = [page(n, "g3", 25, ended=ended, resumed_from_step=25) for n in (0, 1)]
    life.look(60, job(ready=2), [pod(0), pod(1, "b", created=at(34))], again)
    assert life.status["progress"]["step"] == 25


def test_a_dead_pod_0_does_not_hide_the_others() -> None:
    life = Life()
    life.run()
    life.look(30, job(ready=2), [pod(0), pod(1)], [page(1, step=30)])
    assert life.status["message"] == "step 30 of 100; node 0 does not answer"


def test_silent_launchers_leave_the_last_numbers_standing() -> None:
    life = Life()
    life.run()
    before = life.status
    life.look(300, job(ready=2), [pod(0), pod(1)])
    assert life.status == before


@pytest.mark.parametrize(
    ("phase", "more", "message"),
    [
        (Phase.FETCHING_MODEL, {"gang": ""}, "fetching the model"),
        (
            Phase.PREPARING_DATA,
            {"gang": "", "message": "tokenizing files", "done": 3.0, "total": 10.0},
            "preparing data: tokenizing files (3 of 10)",
        ),
        (Phase.LOADING_MODEL, {}, "loading the model"),
        (Phase.EVALUATING, {"step": 7}, "step 7 of 100, evaluating"),
        (Phase.RENDEZVOUS, {"gang": "", "message": "2 missing"}, "the launchers are meeting: 2 missing"),
    ],
)  # fmt: skip
def test_phases_are_told_in_words(phase: Phase, more: dict[str, object], message: str) -> None:
    life = Life()
    life.look(0, job())
    life.look(2, job(ready=2))
    life.look(5, job(ready=2), [pod(0), pod(1)], [page(0, phase=phase, **more), page(1, phase=phase, **more)])  # type: ignore[arg-type]
    assert (life.status["state"], life.status["message"]) == ("Running", message)


def test_the_launchers_plan_completes_the_plan() -> None:
    life = Life()
    life.run()
    completed = plan().model_copy(update={"total_steps": 100, "model_revision": "f" * 40})
    life.look(30, job(ready=2), [pod(0), pod(1)], [page(0, plan=completed), page(1)])
    assert (life.status["plan"]["totalSteps"], life.status["plan"]["modelRevision"]) == (100, "f" * 40)
    life.look(50, job(ready=2), [pod(0), pod(1)], [page(0), page(1)])
    assert life.status["plan"]["totalSteps"] == 100


def test_a_complete_job_carries_the_verified_artifact() -> None:
    life = Life()
    life.run()
    life.look(80, job(ready=2), [pod(0), pod(1)], [page(n, step=100, phase=Phase.PUBLISHING) for n in (0, 1)])
    assert (life.status["state"], life.status["message"]) == ("Publishing", "publishing the artifact")
    done = [
        replace(pod(0), phase="Succeeded", ready=False, finished=at(90), exit_code=0, termination=published()),
        replace(pod(1), phase="Succeeded", ready=False, finished=at(91), exit_code=0),
    ]
    verdict = life.look(92, job(active=0, succeeded=2, complete=True), done)
    assert (life.status["state"], life.status["message"]) == ("Complete", f"completed: 3 files at {URI}")
    assert life.status["artifacts"] == {"uri": URI, "manifestSha256": "a" * 64, "files": 3, "bytes": 1234}
    assert life.status["metrics"] == {"trainLoss": "1.25", "validationLoss": "1.5"}
    assert (life.status["progress"]["step"], life.status["progress"].get("etaSeconds")) == (100, None)
    assert life.condition("ArtifactsPublished") == ("True", "Verified", f"3 files at {URI}, read back and verified")
    assert life.condition("Complete") == ("True", "Complete", f"completed: 3 files at {URI}")
    assert life.condition("Reconciling")[0] == "False"
    assert life.attempts("number", "endedAt", "cause", "exitCode", "lastStep") == [(1, text(90), "Completed", 0, 100)]
    assert life.status["restarts"] == []
    assert life.told[1:] == [
        "Publishing: training is over; the artifact is being published",
        f"Complete: completed: 3 files at {URI}",
    ]
    assert (verdict.commands, verdict.look_again_seconds) == ((), None)
    assert is_settled(life.resource)


def test_a_complete_job_whose_pods_are_gone_says_that_the_digest_is_unknown() -> None:
    life = Life()
    life.run()
    life.look(92, job(active=0, succeeded=2, complete=True), [])
    assert life.status["state"] == "Complete"
    assert (
        life.status["message"] == f"completed, but the pod that published is gone: {URI}latest.json names the artifact"
    )
    assert life.condition("ArtifactsPublished") == (
        "Unknown",
        "LastWordLost",
        f"the pod of rank 0 is gone; {URI}latest.json names what it published",
    )
    assert life.attempts("cause", "message") == [("Completed", "training finished")]
    assert "artifacts" not in life.status


def test_a_user_error_ends_the_job_at_once_with_the_launchers_sentence_and_hint() -> None:
    life = Life()
    life.run()
    word = said(ExitClass.INVALID_DATA, "line 3 of a.jsonl is not JSON.", hint="correct the line", gang="g1")
    pods = [dead(pod(0), 20, 11, word), dead(pod(1), 21, 11, word)]
    verdict = life.look(22, job(failed=2, failure=("PodFailurePolicy", "Container trainer failed")), pods)
    sentence = "line 3 of a.jsonl is not JSON (correct the line)"
    assert (life.status["state"], life.status["message"]) == ("Failed", sentence)
    assert life.condition("Failed") == ("True", "InvalidData", sentence)
    assert life.condition("Stalled") == ("True", "InvalidData", sentence)
    assert life.condition("Running") == ("False", "InvalidData", "the job has failed")
    assert life.told[1:] == [f"Failed: {sentence}"]
    assert verdict.commands == ()


def test_a_user_error_that_the_job_does_not_know_yet_stops_it() -> None:
    life = Life()
    life.run()
    word = said(ExitClass.NUMERICAL_ERROR, "the loss of step 7 is NaN", gang="g1")
    verdict = life.look(22, job(failed=1), [dead(pod(0), 20, 14, word), pod(1)])
    assert life.status["state"] == "Failed"
    assert verdict.commands == (StopJob(),)


def test_a_step_that_was_checkpointed_was_reached_though_nobody_heard_the_last_words() -> None:
    life = Life(spec={"runPolicy": {"suspend": True}})
    life.resource["spec"] = {}
    life.run()
    life.resource["spec"] = {"runPolicy": {"suspend": True}}
    leaving = [replace(pod(0), deleted=at(140)), replace(pod(1), deleted=at(140))]
    asked = job(suspended=True, ready=2, terminating=2)
    life.look(20, asked, leaving, [page(0, step=8), page(1, step=8)])
    saved = {"checkpoint_step": 9, "checkpoint_uri": f"{URI}c/9/", "phase": Phase.CHECKPOINTING}
    life.look(20.5, asked, leaving, [page(0, step=9, **saved), page(1, step=9, **saved)])
    life.look(23, job(suspended=True, active=0), [])
    assert (life.status["checkpoint"]["step"], life.status["progress"]["step"]) == (9, 9)
    assert life.attempts("cause", "lastStep") == [("Suspended", 9)]


def test_a_suspended_job_checkpoints_frees_its_pods_and_resumes() -> None:
    life = Life(spec={"runPolicy": {"suspend": True}})
    life.resource["spec"] = {}
    life.run()
    life.resource["spec"] = {"runPolicy": {"suspend": True}}
    leaving = [replace(pod(0), deleted=at(140)), replace(pod(1), deleted=at(140))]
    life.look(21, job(suspended=True, ready=2, terminating=2), leaving, [page(0, step=8), page(1, step=8)])
    assert (life.status["state"], life.status["message"]) == (
        "Suspending",
        "suspending: ftj-bot-0-aaaaa and ftj-bot-1-aaaaa write a checkpoint and end",
    )
    word = said(ExitClass.INTERRUPTED, "stopped", gang="g1", step=9, checkpoint_step=9, checkpoint_uri=f"{URI}c/9/")
    life.look(25, job(suspended=True, active=0, terminating=1), [dead(leaving[0], 24, 143, word), leaving[1]])
    assert life.status["message"] == "suspending: ftj-bot-1-aaaaa writes a checkpoint and ends"
    verdict = life.look(26, job(suspended=True, active=0), [])
    assert (life.status["state"], life.status["message"]) == (
        "Suspended",
        "suspended: no pod is left; it will resume from step 9 or later",
    )
    assert life.condition("Suspended") == (
        "True",
        "Suspended",
        "suspended: no pod is left; it will resume from step 9 or later",
    )
    assert life.attempts("number", "endedAt", "cause", "lastStep") == [(1, text(24), "Suspended", 9)]
    assert verdict.look_again_seconds is None
    life.resource["spec"] = {}
    life.look(100, job(active=2), [new_pod(0, "b", created=at(99)), new_pod(1, "b", created=at(99))])
    assert life.status["state"] == "Pending"
    pods = [pod(0, "b", created=at(99), started=at(101)), pod(1, "b", created=at(99), started=at(101))]
    life.look(103, job(ready=2), pods)
    life.look(106, job(ready=2), pods, [page(0, "g2", 9, resumed_from_step=9), page(1, "g2", 9, resumed_from_step=9)])
    assert life.attempts("number", "cause", "resumedFromStep", "lostSteps") == [
        (1, "Suspended", None, 0),
        (2, None, 9, None),
    ]
    assert life.status["restarts"] == [{"cause": "Suspended", "count": 1}]
    assert [line.split(":")[0] for line in life.told] == [
        "Running",
        "Suspending",
        "Suspended",
        "Resumed",
        "Running",
    ]
    assert life.condition("Suspended")[0] == "False"


def test_a_deadline_keeps_the_checkpoint_and_says_so() -> None:
    life = Life(spec={"runPolicy": {"activeDeadlineSeconds": 60}})
    life.run()
    failure = ("DeadlineExceeded", "Job was active longer than specified deadline")
    life.look(61, job(terminating=2, failure=failure), [replace(pod(n), deleted=at(180)) for n in (0, 1)])
    over = "the job ran longer than runPolicy.activeDeadlineSeconds (60 s)"
    assert life.status["message"] == f"{over}; its pods write a checkpoint and end"
    assert life.condition("Running") == ("False", "DeadlineExceeded", over)
    word = said(ExitClass.INTERRUPTED, "stopped", gang="g1", step=9, checkpoint_step=9, checkpoint_uri=f"{URI}c/9/")
    life.look(70, job(active=0, failed=2, failure=failure), [dead(pod(n), 65, 143, word) for n in (0, 1)])
    sentence = "the job ran longer than runPolicy.activeDeadlineSeconds (60 s); the checkpoint of step 9 is kept"
    assert life.condition("Failed") == ("True", "DeadlineExceeded", sentence)
    assert life.attempts("cause", "lastStep") == [("DeadlineExceeded", 9)]


def test_a_pod_on_a_lost_node_is_removed_by_force() -> None:
    life = Life()
    life.run()
    lost = replace(pod(1), deleted=at(40), ready=False)
    verdict = life.look(50, job(ready=1, terminating=1), [pod(0), lost], [page(0, step=9)])
    assert verdict.commands == ()
    verdict = life.look(51, job(ready=1, terminating=1), [pod(0), lost], [page(0, step=9)])
    assert verdict.commands == (DeletePod(lost.name, lost.uid, force=True),)
    assert life.attempts("cause", "pod", "node", "message") == [
        (
            "NodeLost",
            lost.name,
            "n2",
            f"pod {lost.name} was given up because node n2 has not confirmed its end 10 s after its grace period",
        )
    ]


def test_a_pod_that_stops_being_ready_is_named() -> None:
    life = Life()
    life.run()
    life.look(22, job(ready=1), [pod(0), pod(1, ready=False)], [page(0, step=9)])
    assert life.status["state"] == "Running"
    assert life.condition("PodsReady") == ("False", "PodsNotReady", "ftj-bot-1-aaaaa is not ready")
    life.look(33, job(ready=2), [pod(0), pod(1)], [page(0, step=9), page(1, step=9)])
    assert life.condition("PodsReady") == ("True", "Ready", "2 pods are ready")


def test_a_survivor_that_neither_waits_nor_gives_up_is_removed_after_both_timeouts() -> None:
    life = Life()
    life.run()
    stuck = replace(pod(0), ready=False)
    gone = dead(pod(1), 20, 137)
    new = pod(1, "b", created=at(30), started=at(31))
    assert life.look(1219, job(ready=1, failed=1), [stuck, gone, new], [page(1, "")]).commands == ()
    verdict = life.look(1221, job(ready=1, failed=1), [stuck, gone, new], [page(1, "")])
    assert verdict.commands == (DeletePod(stuck.name, stuck.uid),)
    assert life.look(1230, job(ready=1, failed=1), [stuck, gone, new], [page(0, ""), page(1, "")]).commands == ()


def test_a_job_that_is_over_lives_as_long_as_its_owner_wants() -> None:
    life = Life(spec={"runPolicy": {"ttlSecondsAfterFinished": 100}})
    life.run()
    verdict = life.look(92, job(active=0, complete=True), [])
    assert verdict.look_again_seconds == 100.0
    assert seconds_to_live(life.resource, at(150)) == 42.0
    verdict = life.look(150, job(active=0, complete=True), [])
    assert (verdict.commands, verdict.look_again_seconds) == ((), 42.0)
    assert life.look(192, job(active=0, complete=True), []).commands == (DeleteResource(),)


def test_nothing_happens_to_a_settled_job_except_that_a_new_generation_is_acknowledged() -> None:
    life = Life()
    life.run()
    life.look(92, job(active=0, complete=True), [])
    before = life.status
    life.look(5000, job(failed=3, failure=("BackoffLimitExceeded", "no")), [dead(pod(0), 4000, 31)])
    assert life.status == before
    life.resource["metadata"] = {**life.resource["metadata"], "generation": 2}
    assert not is_settled(life.resource)
    life.look(5001, None)
    conditions = [{**known, "observedGeneration": 2} for known in before["conditions"]]
    assert life.status == {**before, "observedGeneration": 2, "conditions": conditions}
    assert is_settled(life.resource)


def test_an_invalid_job_lists_every_problem_once() -> None:
    life = Life()
    problems = [
        Problem("spec.training.epochs", 0, "must be at least 1", "raise it"),
        Problem("spec.model.uri", None, "is missing", "name the base model"),
    ]
    verdict = derive_invalid(life.observed(0, None), problems)
    life.resource["status"] = dump(verdict.status)
    assert life.status["state"] == "Invalid"
    first = "spec.training.epochs: must be at least 1, not 0; raise it"
    assert life.status["message"] == f"{first} (and 1 more: see condition Accepted)"
    assert life.condition("Accepted") == (
        "False",
        "InvalidSpec",
        f"{first}\nspec.model.uri: is missing; name the base model",
    )
    assert [(event.reason, event.type.value) for event in verdict.events] == [("Invalid", "Warning")]
    again = derive_invalid(life.observed(9, None), problems)
    assert (dump(again.status), again.events) == (life.status, ())
    assert is_settled(life.resource)
    life.resource["metadata"] = {**life.resource["metadata"], "generation": 2}
    assert not is_settled(life.resource)
    life.look(10, job())
    assert life.condition("Accepted")[0] == "True"
    assert life.condition("Stalled")[0] == "False"


PROBLEMS = [Problem("spec.novelty", None, "is not a known field", "remove it")]


def test_a_job_that_another_version_started_is_looked_after_though_this_one_refuses_its_spec() -> None:
    life = Life(spec={"output": {"uri": "s3://adapters"}})
    life.run()
    planned = life.status["plan"]
    pods = (pod(0), pod(1))
    verdict = derive(
        life.observed(30, job(ready=2), pods=pods, progress=(page(0, step=9), page(1, step=9))),
        None,
        SETTINGS,
        PROBLEMS,
    )
    life.resource["status"] = dump(verdict.status)
    assert (life.status["state"], life.status["progress"]["step"], life.status["plan"]) == ("Running", 9, planned)
    refused = ("False", "InvalidSpec", "spec.novelty: is not a known field; remove it")
    assert life.condition("Accepted") == refused
    assert [event.reason for event in verdict.events] == ["Invalid"]
    assert not is_settled(life.resource, job())
    again = derive(life.observed(41, job(ready=2)), None, SETTINGS, PROBLEMS)
    assert again.events == ()
    over = derive(life.observed(90, job(active=0, complete=True), pods=()), None, SETTINGS, PROBLEMS)
    assert (over.status.state, over.status.message) == (
        "Complete",
        "completed, but the pod that published is gone: s3://adapters/ns/bot/u/latest.json names the artifact",
    )


def test_what_was_started_is_not_settled_though_its_status_says_invalid() -> None:
    life = Life()
    life.resource["status"] = dump(derive_invalid(life.observed(0, None), PROBLEMS).status)
    assert is_settled(life.resource)
    assert not is_settled(life.resource, job())


def _first_published() -> PodView:
    return replace(dead(pod(0), 60, 0, published()), phase="Succeeded")


@pytest.mark.parametrize(
    ("fate", "policy"),
    [
        (dead(pod(1), 61, 137), {"maxRestarts": 0}),
        (dead(pod(1), 61, 137, killed_for_memory=True, memory_limit="8Gi"), {}),
        (pod(1, ready=False), {}),
    ],
    ids=["killed without a budget", "out of memory", "on a node that does not answer"],
)
def test_a_verified_artifact_is_the_end_whatever_happens_to_another_pod_afterwards(
    fate: PodView, policy: dict[str, Any]
) -> None:
    life = Life(spec={"runPolicy": policy})
    life.run()
    known = job(succeeded=1, failed=int(fate.ended), active=1, ready=0)
    life.look(63, known, [_first_published(), fate])
    assert (life.status["state"], life.attempts("cause")) == ("Running", [("Completed",)])
    life.look(121, known, [_first_published(), fate])
    assert (life.status["state"], life.status["message"]) == ("Complete", f"completed: 3 files at {URI}")
    assert life.condition("ArtifactsPublished")[:2] == ("True", "Verified")
    assert life.condition("PodsReady")[2] == "one pod has succeeded"
    assert (life.attempts("number", "cause"), "restarts" in life.status) == ([(1, "Completed")], True)
    assert not [line for line in life.told if line.startswith("Restarting")]


@pytest.mark.parametrize("fate", [[pod(1)], [dead(pod(1), 69, 32)], []], ids=["ends late", "fails", "is gone too"])
def test_a_verified_artifact_is_known_though_the_pod_that_told_it_is_gone(fate: list[PodView]) -> None:
    """A drain removes pods that have ended at once."""
    life = Life(spec={"runPolicy": {"maxRestarts": 0}})
    life.run()
    known = job(succeeded=1, active=1, ready=1)
    life.look(61, known, [_first_published(), pod(1)], [page(1, step=100, phase=Phase.DONE)])
    told = life.status["artifacts"]
    assert (told["manifestSha256"], life.status["metrics"]["trainLoss"]) == ("a" * 64, "1.25")
    life.look(70, job(succeeded=1, active=1, ready=0), fate)
    assert (life.status["state"], life.attempts("cause")) == ("Running", [("Completed",)])
    life.look(121, job(succeeded=1, active=1, ready=0), fate)
    assert (life.status["state"], life.status["message"]) == ("Complete", f"completed: 3 files at {URI}")
    assert (life.status["artifacts"], life.attempts("number", "cause")) == (told, [(1, "Completed")])
    assert not [line for line in life.told if line.startswith("Restarting")]


def test_a_status_of_another_version_is_read_as_far_as_it_goes() -> None:
    life = Life()
    life.run()
    status = {**life.status, "novelty": {"a": 1}, "progress": {"step": 7, "mood": "good"}}
    status["attempts"] = [*status["attempts"], {"number": "x"}]
    life.resource["status"] = status
    life.look(12, job(ready=2), [pod(0), pod(1)], [page(0, step=9), page(1, step=9)])
    assert (life.status["state"], life.status["progress"]["step"]) == ("Running", 9)
    assert life.attempts("number") == [(1,)]


def test_transition_times_move_only_with_the_status() -> None:
    life = Life()
    life.run()
    life.look(60, job(ready=2), [pod(0), pod(1)], [page(0, step=9), page(1, step=9)])
    times = {c["type"]: c["lastTransitionTime"] for c in life.status["conditions"]}
    assert times == {"Accepted": text(0), "PodsReady": text(2), "Running": text(2), "Reconciling": text(0)}


def test_no_text_exceeds_its_bound_or_holds_a_line_break() -> None:
    life = Life()
    life.run()
    word = said(ExitClass.INVALID_DATA, "very\nlong " * 900, hint="h" * 5000, gang="g1")
    life.look(22, job(failed=1), [dead(pod(0), 20, 11, word), pod(1)])
    assert len(life.status["message"]) <= 1024
    assert "\n" not in life.status["message"]
    assert life.status["attempts"][0]["message"].endswith("...")
    assert len(life.status["attempts"][0]["message"]) == 512
    assert all(len(line) <= 1100 for line in life.told)


def test_the_clock_is_the_observed_one() -> None:
    observed = Observed({"metadata": {"generation": 1}, "spec": {}}, START, job())
    assert derive(observed, plan(), SETTINGS) == derive(observed, plan(), SETTINGS)
