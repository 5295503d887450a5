"""The ledger of attempts: every end counted once, the guilty one named, whoever tells it and in whatever order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.operator.job_life import URI, Life, at, dead, job, new_pod, over, page, pod, said, text

from finetune_api.exits import ExitClass
from finetune_api.report import Phase, Progress

KILLED = "rank 1 was killed by SIGKILL"


def in_place(*gangs: str, now: str) -> list[Progress]:
    """Both launchers remember that rank 1 was killed in every one of ``gangs``."""
    ended = tuple(
        over(gang, ExitClass.RANK_KILLED, 20 + 20 * n, KILLED, guilty_rank=1, guilty_node=1, last_step=18 + 10 * n)
        for n, gang in enumerate(gangs)
    )
    phase = Phase.TRAINING if now else Phase.RENDEZVOUS
    started = at(30).timestamp()
    return [
        page(node, now, 20, phase, ended=ended, resumed_from_step=15, attempt_started_at=started) for node in (0, 1)
    ]


def test_a_restart_in_place_told_by_two_launchers_counts_once() -> None:
    life = Life()
    life.run()
    pods = [pod(0), pod(1)]
    life.look(31, job(ready=2), pods, in_place("g1", now=""))
    assert life.status["state"] == "Restarting"
    assert life.status["message"] == (
        f"restarting from the beginning after attempt 1 ended: {KILLED}; now: the launchers are meeting"
    )
    life.look(36, job(ready=2), pods, in_place("g1", now="g2"))
    assert life.status["state"] == "Running"
    names = ("number", "startedAt", "endedAt", "cause", "exitCode", "pod", "node", "resumedFromStep", "lastStep")
    assert life.attempts(*names, "lostSteps", "gang") == [
        (1, text(2), text(20), "RankKilled", 31, "ftj-bot-1-aaaaa", "n2", None, 18, 3, "g1"),
        (2, text(30), None, None, None, None, None, 15, None, None, "g2"),
    ]
    assert (life.status["totalAttempts"], life.status["restarts"]) == (2, [{"cause": "RankKilled", "count": 1}])
    assert life.told[1:] == [
        f"Restarting: attempt 1 ended at step 18 (RankKilled): {KILLED}",
        "Running: attempt 2 runs: FSDP full shard, QLoRA, world size 2 on 2 pods",
    ]


def test_pods_that_a_node_rejected_long_ago_end_no_attempt_that_runs_now() -> None:
    """A failed pod stays for as long as its Job; the ledger lists the last twenty attempts only."""
    life = Life(spec={"runPolicy": {"maxRestarts": 3}})
    life.run()
    meeting = [page(0, "", phase=Phase.RENDEZVOUS)]
    there = [pod(0), dead(pod(1), 60, 143, said(ExitClass.INTERRUPTED, "stopped", gang="g1"))]
    for number in range(25):
        when = 100 + 60 * number
        message = "Pod was rejected: Allocate failed due to no healthy devices"
        there.append(
            new_pod(1, name=f"ftj-bot-1-r{number:04d}", uid=f"r{number:07d}-x", created=at(when), failed=at(when))
        )
        there[-1] = replace(there[-1], phase="Failed", node="n2", reason="UnexpectedAdmissionError", message=message)
        life.look(when + 2, job(ready=1), there, meeting)
    there.append(pod(1, "z", created=at(1700), started=at(1701)))
    restarts = life.status["restarts"]
    for seconds in (1710, 1720, 2300):
        pages = [page(node, "g9", step=7, attempt_started_at=at(1705).timestamp()) for node in (0, 1)]
        verdict = life.look(seconds, job(ready=2), there, pages)
        assert (life.status["state"], life.status["restarts"], verdict.commands) == ("Running", restarts, ())
    assert life.attempts("cause", "gang")[-2:] == [("Rejected", None), (None, "g9")]


def test_restarts_that_nobody_watched_are_all_in_the_ledger_afterwards() -> None:
    life = Life()
    life.look(0, job())
    life.look(2, job(ready=2))
    life.look(70, job(ready=2), [pod(0), pod(1)], in_place("g1", "g2", "g3", now="g4"))
    assert life.attempts("number", "cause", "gang") == [
        (1, "RankKilled", "g1"),
        (2, "RankKilled", "g2"),
        (3, "RankKilled", "g3"),
        (4, None, "g4"),
    ]
    assert len([line for line in life.told if line.startswith("Restarting")]) == 3


@pytest.mark.parametrize("order", ["pod first", "launcher first"])
def test_the_guilty_end_names_the_attempt_whoever_speaks_first(order: str) -> None:
    life = Life()
    life.run()
    broken = over("g1", ExitClass.COMMUNICATION_FAILED, 22, "the collective broke", last_step=9)
    gone = dead(pod(1), 20, 143, None, disruption=("PreemptionByScheduler", "Preempted by higher priority pod"))
    if order == "pod first":
        life.look(21, job(ready=1), [pod(0), gone], [page(0, step=9)])
    else:
        life.look(23, job(ready=1), [pod(0), pod(1)], [page(0, "", ended=(broken,))])
        assert life.attempts("cause") == [("CommunicationFailed",)]
    life.look(26, job(ready=1), [pod(0), gone, new_pod(1, "b")], [page(0, "", ended=(broken,))])
    assert life.attempts("number", "endedAt", "cause", "pod", "lastStep", "message") == [
        (
            1,
            text(20),
            "Preempted",
            gone.name,
            9,
            f"pod {gone.name} was preempted: Preempted by higher priority pod",
        )
    ]
    assert life.status["restarts"] == [{"cause": "Preempted", "count": 1}]
    assert len([line for line in life.told if line.startswith("Restarting")]) == 1


@pytest.mark.parametrize("finished", [10, 12])
def test_of_two_equal_ends_the_one_that_knows_the_pod_names_the_attempt(finished: int) -> None:
    """The launcher says what ended its ranks, and its pod ends of the same cause a moment before or after."""
    life = Life()
    life.run()
    ended = (over("g1", ExitClass.INVALID_DATA, 11, "the data set cannot be trained on"),)
    word = said(ExitClass.INVALID_DATA, "line 3 is not JSON", hint="mend it", gang="g1", ended=ended)
    failed = dead(pod(0), finished, word.exit_code, word)
    life.look(13, job(ready=1, failed=1), [failed, pod(1)], [page(1, step=4)])
    assert life.attempts("cause", "pod", "node", "message") == [
        ("InvalidData", failed.name, "n1", "line 3 is not JSON (mend it)")
    ]


def test_an_attempt_that_came_and_went_between_two_looks_ends_the_one_before() -> None:
    """Suspended, resumed and broken again, and all that the operator hears is the end of the second attempt."""
    life = Life()
    life.run()
    life.look(5, job(ready=2), [pod(0), pod(1)], [page(0, step=4)])
    ended = (over("g2", ExitClass.COMMUNICATION_FAILED, 40, "a peer was lost", started_at=at(30).timestamp()),)
    life.look(41, job(ready=1), None, [page(1, "", phase=Phase.RENDEZVOUS, ended=ended)])
    assert life.attempts("number", "gang", "endedAt", "cause") == [
        (1, "g1", text(30), "Unknown"),
        (2, "g2", text(40), "CommunicationFailed"),
    ]


def test_where_a_short_attempt_began_is_known_though_nobody_looked_while_it_ran() -> None:
    life = Life()
    life.look(0, job())
    life.look(2, job(ready=2))
    word = said(ExitClass.COMPLETED, "done", gang="g1", step=20, resumed_from_step=0)
    over_now = [replace(pod(n), phase="Succeeded", ready=False, termination=word) for n in (0, 1)]
    life.look(6, job(complete=True, succeeded=2, active=0), over_now)
    assert life.attempts("cause", "resumedFromStep", "lastStep") == [("Completed", 0, 20)]


def test_a_step_that_is_resumed_from_was_reached() -> None:
    """The last words of a pod that is suspended may be removed with it."""
    life = Life()
    life.run()
    life.look(20, job(ready=2), [pod(0), pod(1)], [page(0, step=60), page(1, step=60)])
    life.spec["runPolicy"] = {"suspend": True}
    life.look(30, job(suspended=True, active=0), [])
    assert life.attempts("cause", "lastStep") == [("Suspended", 60)]
    life.spec["runPolicy"] = {"suspend": False}
    pods = [new_pod(n, "b") for n in (0, 1)]
    started = at(40).timestamp()
    pages = [page(n, "g2", 70, resumed_from_step=69, attempt_started_at=started) for n in (0, 1)]
    life.look(45, job(ready=2), pods, pages)
    assert life.attempts("lastStep", "resumedFromStep", "lostSteps") == [(69, None, 0), (None, 69, None)]


def test_a_deleted_pod_that_vanished_between_two_looks_is_missed() -> None:
    life = Life()
    life.run()
    life.look(30, job(ready=1), [pod(0), new_pod(1, "b", created=at(25))], [page(0, "", phase=Phase.RENDEZVOUS)])
    assert life.attempts("endedAt", "cause", "lastStep", "message") == [
        (text(30), "PodDeleted", 3, "a pod was deleted")
    ]
    assert life.status["state"] == "Restarting"


def test_a_vanished_pod_explains_a_broken_collective() -> None:
    life = Life()
    life.run()
    broken = over("g1", ExitClass.COMMUNICATION_FAILED, 22, "the collective broke", last_step=9)
    life.look(30, job(ready=1), [pod(0)], [page(0, "", phase=Phase.RENDEZVOUS, ended=(broken,))])
    assert life.attempts("number", "endedAt", "cause", "lastStep") == [(1, text(22), "PodDeleted", 9)]


def test_a_gracefully_deleted_pod_stops_its_peers_and_all_of_it_is_one_attempt() -> None:
    life = Life()
    life.run()
    stopped = over("g1", ExitClass.INTERRUPTED, 20, "rank 1 was asked to stop", last_step=9)
    word = said(ExitClass.INTERRUPTED, "stopped", gang="g1", ended=(stopped,), step=9, checkpoint_step=9,
                checkpoint_uri=f"{URI}c/9/")  # fmt: skip
    ended = dead(pod(1), 21, 143, word, deleted=at(140))
    life.look(22, job(ready=1, failed=1), [pod(0), ended], [page(0, "", phase=Phase.RENDEZVOUS, ended=(stopped,))])
    assert life.attempts("cause", "endedAt", "lastStep", "message") == [
        ("PodDeleted", text(20), 9, f"pod {ended.name} was deleted")
    ]
    assert life.status["message"].startswith(
        f"restarting from step 9 or later after attempt 1 ended: pod {ended.name} was deleted; now: "
    )
    new = pod(1, "b", created=at(24), started=at(26))
    pages = [page(n, "g2", 9, ended=(stopped,) if n == 0 else (), resumed_from_step=9) for n in (0, 1)]
    life.look(40, job(ready=2, failed=1), [pod(0), ended, new], pages)
    assert life.attempts("number", "cause", "resumedFromStep", "lostSteps") == [
        (1, "PodDeleted", None, 0),
        (2, None, 9, None),
    ]


def test_a_lost_pod_0_takes_its_peers_along_and_all_of_it_is_one_attempt() -> None:
    life = Life()
    life.run()
    first = dead(pod(0), 20, 137)
    life.look(21, job(ready=1, failed=1), [first, pod(1)], [page(1, step=9)])
    assert life.attempts("cause", "message") == [
        ("RankKilled", "the launcher in pod ftj-bot-0-aaaaa was killed by signal 9")
    ]
    lost = over("g1", ExitClass.COMMUNICATION_FAILED, 30, "node 1 lost the store", last_step=9)
    second = dead(
        pod(1), 31, 33, said(ExitClass.COMMUNICATION_FAILED, "node 1 lost the store", gang="g1", ended=(lost,))
    )
    life.look(32, job(failed=2), [first, second, new_pod(0, "b", created=at(30))])
    pods = [first, second, *(pod(n, "b", created=at(33), started=at(35)) for n in (0, 1))]
    life.look(50, job(ready=2, failed=2), pods, [page(n, "g2", 5, resumed_from_step=5) for n in (0, 1)])
    assert life.attempts("number", "cause", "exitCode", "lastStep", "lostSteps") == [
        (1, "RankKilled", 137, 9, 4),
        (2, None, None, None, None),
    ]
    assert len([line for line in life.told if line.startswith("Restarting")]) == 1


def test_pods_that_fail_before_the_ranks_start_together_are_one_attempt_each_time() -> None:
    life = Life()
    life.look(0, job())
    down = said(ExitClass.STORAGE_UNAVAILABLE, "s3 did not answer for 300 s")
    first = [dead(pod(0), 310, 30, down), dead(pod(1), 312, 30, down)]
    life.look(313, job(failed=2), first)
    assert life.attempts("number", "startedAt", "cause", "exitCode") == [(1, text(0), "StorageUnavailable", 30)]
    second = [dead(pod(n, "b", created=at(320)), 640 + n, 30, down) for n in (0, 1)]
    life.look(645, job(failed=4), [*first, *second])
    assert life.attempts("number", "startedAt", "cause") == [
        (1, text(0), "StorageUnavailable"),
        (2, text(320), "StorageUnavailable"),
    ]
    assert life.status["restarts"] == [{"cause": "StorageUnavailable", "count": 2}]


def test_the_whole_ledger_is_rebuilt_when_the_operator_slept_through_everything() -> None:
    down = said(ExitClass.STORAGE_UNAVAILABLE, "s3 did not answer")
    pods = [dead(pod(n, "a"), 310 + n, 30, down) for n in (0, 1)]
    pods += [dead(pod(n, "b", created=at(320)), 640 + n, 30, down) for n in (0, 1)]
    pods += [pod(n, "c", created=at(650), started=at(651)) for n in (0, 1)]
    awake, asleep = Life(), Life()
    awake.look(0, job())
    awake.look(313, job(failed=2), pods[:2])
    awake.look(645, job(failed=4), pods[:4])
    pages = [page(n, "g1", 3, attempt_started_at=at(655).timestamp()) for n in (0, 1)]
    for life in (awake, asleep):
        life.look(660, job(ready=2, failed=4), pods, pages)
    assert asleep.status["attempts"] == awake.status["attempts"]
    assert asleep.status["restarts"] == awake.status["restarts"]
    assert awake.attempts("number", "cause") == [(1, "StorageUnavailable"), (2, "StorageUnavailable"), (3, None)]


def test_an_attempt_that_is_heard_of_only_after_the_next_one_has_begun_stands_before_it() -> None:
    """The first look came late and saw the launchers only; the second one sees the dead pods."""
    lost = over("g1", ExitClass.COMMUNICATION_FAILED, 5, "a peer was lost", started_at=at(1).timestamp())
    word = said(ExitClass.STORAGE_UNAVAILABLE, "s3 did not answer", ended=(lost,))
    pods = [dead(pod(0), 5, 137), dead(pod(1), 6, 30, word)]
    pods += [pod(n, "b", created=at(11), started=at(12)) for n in (0, 1)]
    pages = [page(n, "g2", attempt_started_at=at(13).timestamp()) for n in (0, 1)]
    life = Life()
    life.look(0, job())
    life.look(14, job(ready=2, failed=2), None, pages)
    assert life.attempts("number", "gang", "endedAt") == [(1, "g2", None)]
    life.look(15, job(ready=2, failed=2), pods, pages)
    assert life.attempts("number", "gang", "startedAt", "endedAt") == [
        (1, "g1", text(1), text(5)),
        (2, "g2", text(13), None),
    ]
    assert life.status["totalAttempts"] == 2
    told = list(life.told)
    life.look(16, job(ready=2, failed=2), pods, pages)
    assert (life.status["totalAttempts"], life.told) == (2, told)


def test_the_last_twenty_attempts_are_listed_and_all_are_counted() -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 100}})
    life.run()
    gangs = [f"g{number}" for number in range(1, 31)]
    pods = [pod(0), pod(1)]
    for number in range(1, 30):
        ended = tuple(over(gang, ExitClass.RANK_KILLED, 10 * n, KILLED) for n, gang in enumerate(gangs[:number], 2))
        now = gangs[number]
        life.look(
            15 + 10 * number,
            job(ready=2),
            pods,
            [page(n, now, ended=ended[-5:], attempt_started_at=at(12 + 10 * number).timestamp()) for n in (0, 1)],
        )
    assert [number for (number,) in life.attempts("number")] == list(range(11, 31))
    assert life.status["totalAttempts"] == 30
    assert life.status["restarts"] == [{"cause": "RankKilled", "count": 29}]


def test_old_pods_of_attempts_that_are_no_longer_listed_are_not_counted_again() -> None:
    life = Life(spec={"runPolicy": {"maxRestarts": 100}})
    down = said(ExitClass.STORAGE_UNAVAILABLE, "s3 did not answer")
    pods = [dead(pod(0, f"{n:04d}", created=at(100 * n)), 100 * n + 50, 30, down) for n in range(30)]
    life.look(3000, job(failed=30), pods)
    life.look(3010, job(failed=30), pods)
    assert life.status["totalAttempts"] == 30
    assert life.status["restarts"] == [{"cause": "StorageUnavailable", "count": 30}]
    assert [number for (number,) in life.attempts("number")] == list(range(11, 31))


def test_each_pod_stands_in_one_attempt_only() -> None:
    life = Life()
    life.run()
    assert life.attempts("pods") == [(["aaaa0000", "aaaa0001"],)]
    life.look(36, job(ready=2), [pod(0), pod(1)], in_place("g1", now="g2"))
    assert life.attempts("pods") == [([],), (["aaaa0000", "aaaa0001"],)]


def test_launchers_that_saw_their_ranks_stop_before_the_pods_went_away_were_suspended() -> None:
    life = Life()
    life.run()
    life.resource["spec"] = {"runPolicy": {"suspend": True}}
    stopped = over("g1", ExitClass.INTERRUPTED, 20, "rank 0 was asked to stop", last_step=9)
    leaving = [pod(n, deleted=at(140)) for n in (0, 1)]
    life.look(21, job(suspended=True, terminating=2), leaving, [page(1, "", ended=(stopped,))])
    assert life.attempts("cause") == [("Suspended",)]
    life.look(25, job(suspended=True, active=0), [])
    assert life.attempts("number", "endedAt", "cause", "lastStep") == [(1, text(20), "Suspended", 9)]
    assert life.status["restarts"] == [{"cause": "Suspended", "count": 1}]


def test_a_pod_that_must_go_explains_why_the_ranks_stopped() -> None:
    life = Life()
    life.run()
    stopped = over("g1", ExitClass.INTERRUPTED, 20, "rank 1 was asked to stop", last_step=9)
    drained = pod(1, deleted=at(140), disruption=("EvictionByEvictionAPI", "evicting"))
    life.look(21, job(terminating=1, ready=2), [pod(0), drained], [page(0, "", ended=(stopped,))])
    assert life.told[-1] == (
        f"Restarting: attempt 1 ended at step 9 (Drained): pod {drained.name} was evicted by a drain: evicting"
    )
