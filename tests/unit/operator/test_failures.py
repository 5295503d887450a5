"""What an end means for the job: the whole table, the budgets, and the words that a pod's end is told in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.unit.operator.build_shapes import children, smallest
from tests.unit.operator.job_life import Life, at, dead, job, new_pod, over, page, pod, said

from finetune_api.exits import Cause, ExitClass
from finetune_api.report import Termination
from finetune_operator.ends import SIZED_BY
from finetune_operator.failures import POLICIES, Budget, PodCause, allowed_disruptions, policy, spent
from finetune_operator.verdict import StopJob

NEVER, FAILURES, DISRUPTIONS, FREE = Budget.NEVER, Budget.FAILURES, Budget.DISRUPTIONS, Budget.FREE


def test_every_exit_class_and_every_cause_has_a_policy() -> None:
    assert set(POLICIES) == {*ExitClass, *PodCause}


@pytest.mark.parametrize("exit_class", ExitClass)
def test_the_budget_follows_who_can_mend_it(exit_class: ExitClass) -> None:
    expected = {
        Cause.NONE: FREE,
        Cause.USER: NEVER,
        Cause.INFRASTRUCTURE: FAILURES,
        Cause.BUG: FAILURES,
        Cause.INTERRUPTION: DISRUPTIONS,
    }
    assert policy(exit_class).budget == expected[exit_class.cause]


def test_a_cause_of_another_version_counts_as_unknown() -> None:
    assert policy("SolarFlare") == policy(PodCause.UNKNOWN)


@pytest.mark.parametrize(
    ("restarts", "maximum", "reason"),
    [
        ({}, 0, None),
        ({"RankKilled": 3}, 3, None),
        ({"RankKilled": 2, "InternalError": 2}, 3, "RestartBudgetExceeded"),
        ({"RankKilled": 1}, 0, "RestartBudgetExceeded"),
        ({"Preempted": 30}, 3, None),
        ({"Preempted": 20, "NodeLost": 11}, 3, "DisruptionBudgetExceeded"),
        ({"PodDeleted": 10}, 0, None),
        ({"PodDeleted": 11}, 0, "DisruptionBudgetExceeded"),
        ({"Suspended": 1000}, 0, None),
    ],
)
def test_budgets_are_counted_by_cause(restarts: dict[str, int], maximum: int, reason: str | None) -> None:
    over = spent(restarts, maximum)
    assert (over.reason if over else None) == reason


def test_disruptions_are_bounded_too() -> None:
    assert [allowed_disruptions(restarts) for restarts in (0, 1, 3, 100)] == [10, 10, 30, 1000]


OUTGROWN = 'Usage of EmptyDir volume "{}" exceeds the limit "20Gi". '


@pytest.mark.parametrize(
    ("changes", "spec", "cause", "message"),
    [
        (
            {"exit_code": 137, "killed_for_memory": True, "memory_limit": "4Gi"},
            {"resources": {"limits": {"memory": "4Gi"}}},
            "OutOfMemory",
            "pod P was killed because it needed more host memory than spec.resources.limits.memory (4Gi);"
            " raise it, or lower training.microBatchSize or dataset.maxSequenceLength",
        ),
        (  # a LimitRange of the namespace
            {"exit_code": 137, "killed_for_memory": True, "memory_limit": "512Mi"},
            {"resources": {"limits": {}}},
            "OutOfMemory",
            "pod P was killed because it needed more host memory than the 512Mi that the namespace allows where"
            " spec.resources.limits.memory is absent;"
            " set it, or lower training.microBatchSize or dataset.maxSequenceLength",
        ),
        (
            {"exit_code": 137, "killed_for_memory": True},
            {},
            "NodeOutOfMemory",
            "pod P was killed because node n1 ran out of memory;"
            " set spec.resources.requests.memory so that enough is kept for it",
        ),
        ({"exit_code": 137}, {}, "RankKilled", "the launcher in pod P was killed by signal 9"),
        (
            {"exit_code": 143, "disruption": ("PreemptionByScheduler", "default-scheduler: preempting to make room.")},
            {},
            "Preempted",
            "pod P was preempted: default-scheduler: preempting to make room",
        ),
        (
            {"exit_code": None, "disruption": ("DeletionByTaintManager", "Taint manager: deleting due to NoExecute")},
            {},
            "NodeLost",
            "pod P was lost with node n1: Taint manager: deleting due to NoExecute",
        ),
        (
            {"exit_code": 143, "disruption": ("EvictionByEvictionAPI", "Eviction API: evicting")},
            {},
            "Drained",
            "pod P was evicted by a drain: Eviction API: evicting",
        ),
        (
            {"exit_code": 137, "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage. "},
            {},
            "Evicted",
            "pod P was evicted: The node was low on resource: ephemeral-storage",
        ),
        (
            {"exit_code": 137, "reason": "Evicted", "message": OUTGROWN.format("work")},
            {"resources": {"scratch": "20Gi"}},
            "OutOfSpace",
            'pod P was evicted because it outgrew spec.resources.scratch (Usage of EmptyDir volume "work" exceeds the'
            ' limit "20Gi"); raise it',
        ),
        (
            {"exit_code": 137, "reason": "Evicted", "message": OUTGROWN.format("shm")},
            {},
            "OutOfSpace",
            'pod P was evicted because it outgrew spec.resources.sharedMemory (Usage of EmptyDir volume "shm" exceeds'
            ' the limit "20Gi"); set it to more',
        ),
        (
            {
                "exit_code": 137,
                "reason": "Evicted",
                "message": "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ",
            },
            {},
            "OutOfSpace",
            "pod P was evicted because it outgrew the limit that the namespace sets for ephemeral-storage (Pod"
            " ephemeral local storage usage exceeds the total limit of containers 1Gi);"
            " only its administrator can raise it: spec.resources.scratch must fit below",
        ),
        (
            {
                "exit_code": 137,
                "reason": "Evicted",
                "message": 'Container trainer exceeded its local ephemeral storage limit "1Gi". ',
            },
            {},
            "OutOfSpace",
            "pod P was evicted because it outgrew the limit that the namespace sets for ephemeral-storage (Container"
            ' trainer exceeded its local ephemeral storage limit "1Gi");'
            " only its administrator can raise it: spec.resources.scratch must fit below",
        ),
        (  # a volume that somebody else has put into the pod
            {"exit_code": 137, "reason": "Evicted", "message": OUTGROWN.format("proxy")},
            {},
            "Evicted",
            'pod P was evicted: Usage of EmptyDir volume "proxy" exceeds the limit "20Gi"',
        ),
        (
            {
                "exit_code": 137,
                "reason": "Evicted",
                "message": OUTGROWN.format("work"),
                "disruption": ("EvictionByEvictionAPI", "Eviction API: evicting"),
            },
            {},
            "Drained",
            "pod P was evicted by a drain: Eviction API: evicting",
        ),
        ({"exit_code": 143, "deleted": at(140)}, {}, "PodDeleted", "pod P was deleted"),
        ({"exit_code": 1}, {}, "InternalError", "pod P exited with code 1 without a last word"),
        ({"exit_code": 32}, {}, "RendezvousFailed", "pod P exited with code 32 without a last word"),
        (
            {"exit_code": 1, "unread": "exec: python: executable file not found"},
            {},
            "InternalError",
            "pod P exited with code 1 with a last word that cannot be read: exec: python: executable file not found",
        ),
        (
            {"exit_code": None, "reason": "DeadlineExceeded", "message": "too slow"},
            {},
            "Unknown",
            "pod P failed without an exit code (too slow)",
        ),
        (
            {"exit_code": 70, "termination": said(ExitClass.INTERNAL_ERROR, "defect: KeyError", hint="report it")},
            {},
            "InternalError",
            "defect: KeyError (report it)",
        ),
        (
            {"exit_code": 143, "termination": said(ExitClass.INTERRUPTED, "stopped from outside")},
            {},
            "Interrupted",
            "stopped from outside",
        ),
        (
            {
                "exit_code": 11,
                "termination": said(ExitClass.INVALID_DATA, "line 3 is not JSON"),
                "disruption": ("EvictionByEvictionAPI", "Eviction API: evicting"),
            },
            {},
            "InvalidData",
            "line 3 is not JSON",
        ),
    ],
)
def test_the_end_of_a_pod_is_told_by_the_first_who_knows(
    changes: dict[str, Any], spec: dict[str, Any], cause: str, message: str
) -> None:
    life = Life(spec={**spec, "runPolicy": {"maxRestarts": 3}})
    life.run()
    ended = replace(pod(0), phase="Failed", ready=False, finished=at(20), **changes)
    life.look(21, job(ready=1, failed=1), [ended, pod(1)])
    assert life.attempts("cause", "message") == [(cause, message.replace("P", ended.name, 1))]
    assert life.attempts("exitCode") == [(changes["exit_code"],)]
    expected = "Failed" if policy(cause).budget == NEVER else "Restarting"
    assert life.status["state"] == expected


def test_a_spent_budget_fails_the_job_and_stops_what_still_runs() -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 1}})
    life.run()
    ends = [over(f"g{n}", ExitClass.RANK_KILLED, 20 * n, "rank 1 was killed by SIGKILL") for n in (1, 2)]
    life.look(31, job(ready=2), [pod(0), pod(1)], [page(n, "g2", 9, ended=(ends[0],)) for n in (0, 1)])
    assert life.status["state"] == "Running"
    word = said(ExitClass.RANK_KILLED, "rank 1 was killed by SIGKILL", gang="g2", ended=tuple(ends))
    verdict = life.look(45, job(failed=2), [dead(pod(0), 41, 31, word), dead(pod(1), 41, 31, word)])
    sentence = "gave up after 2 failures (runPolicy.maxRestarts allows 1); the last one: rank 1 was killed by SIGKILL"
    assert life.condition("Failed") == ("True", "RestartBudgetExceeded", sentence)
    assert life.told[-1] == f"Failed: {sentence}"
    assert verdict.commands == (StopJob(),)
    assert life.status["restarts"] == [{"cause": "RankKilled", "count": 2}]


def test_disruptions_do_not_use_up_the_owners_patience() -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 0}})
    life.run()
    for number in range(2, 7):
        gone = f"{number - 1}"
        pods = [new_pod(n, gone, created=at(20 * number)) for n in (0, 1)]
        life.look(20 * number, job(), pods)
        assert life.status["state"] == "Restarting"
        pods = [replace(found, phase="Running", ready=True, started=at(20 * number + 1)) for found in pods]
        life.look(20 * number + 5, job(ready=2), pods, [page(n, f"g{number}", 9) for n in (0, 1)])
        assert life.status["state"] == "Running"
    assert life.status["restarts"] == [{"cause": "PodDeleted", "count": 5}]


def test_a_job_that_kubernetes_gave_up_on_says_why_in_both_words() -> None:
    life = Life()
    life.run()
    failure = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
    life.look(30, job(failed=1, failure=failure), [dead(pod(0), 20, 137), pod(1)])
    assert life.condition("Failed") == (
        "True",
        "BackoffLimitExceeded",
        "the Job ftj-bot failed (BackoffLimitExceeded): the launcher in pod ftj-bot-0-aaaaa was killed by signal 9",
    )


def test_every_scratch_volume_of_a_pod_has_a_field_that_bounds_it() -> None:
    volumes = children(smallest()).job["spec"]["template"]["spec"]["volumes"]
    assert {volume["name"] for volume in volumes if "emptyDir" in volume} == set(SIZED_BY)


def test_a_job_that_outgrows_its_scratch_is_not_started_again() -> None:
    life = Life(spec={"resources": {"scratch": "20Gi"}})
    life.run()
    evicted = dead(pod(0), 20, 137, reason="Evicted", message=OUTGROWN.format("tmp"))
    verdict = life.look(21, job(ready=1, failed=1), [evicted, pod(1)])
    assert life.condition("Failed")[1] == "OutOfSpace"
    assert verdict.commands == (StopJob(),)


@pytest.mark.parametrize(
    "reason",
    [
        "OutOfcpu",
        "OutOfmemory",
        "OutOfpods",
        "OutOfephemeral-storage",
        "OutOfnvidia.com/gpu",
        "NodeAffinity",
        "TopologyAffinityError",
        "UnexpectedAdmissionError",
        "PodOSSelectorNodeLabelDoesNotMatch",
        "InvalidNodeInfo",
        "AReasonOfTomorrow",
        "Evicted",
    ],
)
def test_a_pod_that_its_node_does_not_admit_is_a_disruption(reason: str) -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 0}})
    life.look(0, job())
    message = "Pod was rejected: Node didn't have enough resource: nvidia.com/gpu, requested: 8, used: 8, capacity: 8"
    rejected = new_pod(0, phase="Failed", node="n1", reason=reason, message=message)
    life.look(4, job(failed=1), [rejected, pod(1)])
    assert life.attempts("cause", "message") == [
        ("Rejected", f"pod {rejected.name} was rejected by node n1: {message.removeprefix('Pod was rejected: ')}")
    ]
    assert life.status["state"] == "Restarting"


def test_what_a_process_killed_for_memory_leaves_in_the_state_of_the_container_is_no_cause_later() -> None:
    """A rank that was restarted in place long ago: the runtime says OOMKilled whatever the container ends of."""
    marked = {"killed_for_memory": True, "memory_limit": "8Gi", "deleted": at(170), "asked_to_go": at(50)}
    stopped = said(ExitClass.INTERRUPTED, "stopped", gang="g1", step=9)

    def cause(exit_code: int, word: Termination | None) -> str:
        life = Life(nodes=1)
        life.look(0, job(nodes=1))
        life.look(2, job(nodes=1, ready=1), [pod(0)], [page(0, step=3)])
        life.look(60, job(nodes=1, failed=1), [dead(pod(0, **marked), 59, exit_code, word)])
        return str(life.attempts("cause")[0][0])

    assert cause(143, stopped) == "PodDeleted"
    assert cause(33, said(ExitClass.COMMUNICATION_FAILED, "lost", gang="g1")) == "CommunicationFailed"
    assert cause(31, said(ExitClass.RANK_KILLED, "rank 0 was killed by SIGKILL", gang="g1")) == "OutOfMemory"
    assert (cause(137, None), cause(137, stopped)) == ("OutOfMemory", "OutOfMemory")


def test_a_kubelet_of_old_that_does_not_say_rejected_is_known_by_its_reason() -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 0}})
    life.look(0, job())
    message = "Pod Predicate NodeAffinity failed"
    life.look(4, job(failed=1), [new_pod(0, phase="Failed", node="n1", reason="NodeAffinity", message=message), pod(1)])
    assert life.attempts("cause", "message") == [
        ("Rejected", f"pod ftj-bot-0-aaaaa was rejected by node n1: {message}")
    ]


def test_a_node_that_shuts_down_and_admits_nothing_is_drained() -> None:
    life = Life()
    life.look(0, job())
    message = "Pod was rejected: Pod was rejected as the node is shutting down."
    life.look(4, job(failed=1), [new_pod(0, phase="Failed", node="n1", reason="NodeShutdown", message=message), pod(1)])
    assert life.attempts("cause") == [("Drained",)]
