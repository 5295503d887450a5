"""Whatever pods, the Job and the launchers do: the ledger only grows, nothing is told twice, the order stands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.operator.job_life import URI, Life, at, dead, job, new_pod, over, page, said

from finetune_api.exits import ExitClass
from finetune_api.report import EndedAttempt, Progress
from finetune_operator.conditions import ORDER
from finetune_operator.derive import changes, dump, is_settled
from finetune_operator.failures import POLICIES
from finetune_operator.observe import PodView
from finetune_operator.situation import status_before

NODES = 2
INFRASTRUCTURE = [ExitClass.RANK_KILLED, ExitClass.STORAGE_UNAVAILABLE, ExitClass.INTERNAL_ERROR]


@dataclass
class Node:
    """One index of the Job: its pods, newest last, and the memory of its launcher."""

    pods: list[PodView] = field(default_factory=list)
    ended: tuple[EndedAttempt, ...] = ()


class Cluster(RuleBasedStateMachine):
    """A small model of what the Job controller, kubelets and launchers do; the operator looks now and then."""

    @initialize(restarts=st.integers(0, 5))
    def begin(self, restarts: int) -> None:
        self.life = Life(spec={"runPolicy": {"maxRestarts": restarts}})
        self.seconds = 0.0
        self.nodes = [Node() for _ in range(NODES)]
        self.made = 0
        self.gangs = 0
        self.gang = ""
        self.gang_began = 0.0
        self.gangs_ended: list[str] = []
        self.step = 0
        self.complete = False
        self.seen: list[dict[str, Any]] = []
        self.looks()

    # ---- the world ------------------------------------------------------------------------------------------------

    def living(self) -> list[PodView]:
        return [node.pods[-1] for node in self.nodes if node.pods and not node.pods[-1].ended]

    def running(self) -> bool:
        return len(self.living()) == NODES and all(p.ready for p in self.living())

    def is_suspended(self) -> bool:
        return bool(self.life.spec["runPolicy"].get("suspend"))

    @rule(seconds=st.floats(0.5, 40))
    def time_passes(self, seconds: float) -> None:
        self.seconds += seconds
        self.step += 1 if self.gang else 0

    @precondition(lambda self: not self.complete and not self.is_suspended() and not is_settled(self.life.resource))
    @rule()
    def the_job_makes_pods(self) -> None:
        for index, node in enumerate(self.nodes):
            if not node.pods or node.pods[-1].ended:
                self.made += 1
                created = at(self.seconds)
                name = f"{self.made:04d}"
                node.pods.append(new_pod(index, name, name=f"ftj-bot-{index}-{name}", created=created))
                node.ended = ()

    @rule(indexes=st.sets(st.integers(0, NODES - 1), min_size=1))
    def kubelets_start_pods(self, indexes: set[int]) -> None:
        for index in indexes:
            pods = self.nodes[index].pods
            if pods and pods[-1].phase == "Pending":
                pods[-1] = replace(pods[-1], phase="Running", node=f"n{index}", started=at(self.seconds), ready=True)

    @precondition(lambda self: not self.complete and not self.is_suspended() and not is_settled(self.life.resource))
    @rule()
    def everything_recovers(self) -> None:
        self.the_job_makes_pods()
        self.kubelets_start_pods({0, 1})
        if not self.gang:
            self.seconds += 1
            self.the_launchers_meet()

    @precondition(lambda self: self.running() and not self.gang)
    @rule()
    def the_launchers_meet(self) -> None:
        self.gangs += 1
        self.gang, self.gang_began, self.step = f"g{self.gangs}", self.seconds, max(0, self.step - 3)

    @precondition(lambda self: self.gang != "")
    @rule(exit_class=st.sampled_from(INFRASTRUCTURE), guilty=st.integers(0, NODES - 1))
    def the_ranks_are_restarted_in_place(self, exit_class: ExitClass, guilty: int) -> None:
        self._end_gang(exit_class, f"rank {guilty} failed", guilty)

    @precondition(lambda self: self.living() != [])
    @rule(index=st.integers(0, NODES - 1), how=st.sampled_from(["killed", "evicted", "storage", "vanished"]))
    def a_pod_ends(self, index: int, how: str) -> None:
        pods = self.nodes[index].pods
        if not pods or pods[-1].ended:
            return
        gang = self.gang
        if self.gang:
            self._end_gang(ExitClass.COMMUNICATION_FAILED, "a peer was lost", None)
        if how == "vanished":
            pods.pop()
            return
        word = None
        if how == "storage":
            word = said(ExitClass.STORAGE_UNAVAILABLE, "s3 is away", gang=gang, ended=self.nodes[index].ended)
        more = {"disruption": ("EvictionByEvictionAPI", "drain")} if how == "evicted" else {}
        code = 30 if how == "storage" else 137
        pods[-1] = dead(pods[-1], self.seconds, code, word, **more)

    def _end_gang(self, exit_class: ExitClass, message: str, guilty: int | None) -> None:
        end = over(
            self.gang,
            exit_class,
            self.seconds,
            message,
            started_at=at(self.gang_began).timestamp(),
            guilty_rank=guilty,
            guilty_node=guilty,
            last_step=self.step,
        )
        for node in self.nodes:
            node.ended = (*node.ended, end)[-5:]
        self.gangs_ended.append(self.gang)
        self.gang = ""

    @precondition(lambda self: self.gang != "" and self.step > 2)
    @rule()
    def training_finishes(self) -> None:
        word = said(ExitClass.COMPLETED, "done", artifact_uri=URI, artifact_manifest_sha256="a" * 64, gang=self.gang)
        for node in self.nodes:
            node.pods[-1] = replace(
                node.pods[-1], phase="Succeeded", ready=False, finished=at(self.seconds), exit_code=0, termination=word
            )
        self.complete, self.gang = True, ""

    @precondition(lambda self: not self.complete)
    @rule(suspend=st.booleans())
    def the_owner_suspends_or_resumes(self, suspend: bool) -> None:
        self.life.spec["runPolicy"]["suspend"] = suspend
        if suspend:
            if self.gang:
                self._end_gang(ExitClass.INTERRUPTED, "stopped", None)
            for node in self.nodes:
                if node.pods and not node.pods[-1].ended:
                    node.pods.pop()

    # ---- the operator ---------------------------------------------------------------------------------------------

    @rule(pods=st.booleans(), reachable=st.booleans())
    def looks(self, pods: bool = True, reachable: bool = True) -> None:
        living = self.living()
        seen = job(
            active=len(living),
            ready=sum(p.ready for p in living),
            failed=sum(p.phase == "Failed" for node in self.nodes for p in node.pods),
            suspended=self.is_suspended(),
            complete=self.complete,
        )
        pages: list[Progress] = []
        if reachable:
            for index, node in enumerate(self.nodes):
                if node.pods and node.pods[-1].phase == "Running":
                    began = at(self.gang_began).timestamp() if self.gang else 0.0
                    pages.append(page(index, self.gang, self.step, ended=node.ended, attempt_started_at=began))
        every = [p for node in self.nodes for p in node.pods] if pods else None
        before = self.life.resource.get("status", {})
        self.life.look(self.seconds, seen, every, pages)
        self._compare(before, self.life.status)

    def _compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        was, now = before.get("attempts", []), after["attempts"]
        assert after.get("totalAttempts", 0) >= before.get("totalAttempts", 0)
        listed = {entry["number"]: entry for entry in now}
        for entry in was:
            if entry["number"] not in listed:
                assert entry["number"] <= after["totalAttempts"] - 20
            elif "endedAt" in entry:
                assert "endedAt" in listed[entry["number"]]
        transitions = {c["type"]: c for c in before.get("conditions", [])}
        for condition in after["conditions"]:
            known = transitions.get(condition["type"])
            if known and known["status"] == condition["status"]:
                assert known["lastTransitionTime"] == condition["lastTransitionTime"]
        assert apply_patch(before, changes(before, after)) == after

    # ---- always ---------------------------------------------------------------------------------------------------

    @invariant()
    def attempts_are_numbered_one_after_the_other(self) -> None:
        numbers = [number for (number,) in self.life.attempts("number")] if "status" in self.life.resource else []
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        if numbers:
            assert numbers[-1] == self.life.status["totalAttempts"]
            assert len(numbers) == min(20, self.life.status["totalAttempts"])

    @invariant()
    def only_the_last_attempt_may_be_open(self) -> None:
        ended = [end is not None for (end,) in self.life.attempts("endedAt")]
        assert all(ended[:-1])
        assert all(
            (cause in POLICIES) == over for (cause,), over in zip(self.life.attempts("cause"), ended, strict=True)
        )

    @invariant()
    def a_gang_and_a_pod_stand_in_one_attempt_each(self) -> None:
        gangs = [gang for (gang,) in self.life.attempts("gang") if gang]
        pods = [uid for (uids,) in self.life.attempts("pods") for uid in uids]
        assert len(gangs) == len(set(gangs))
        assert len(pods) == len(set(pods))

    @invariant()
    def totals_agree_with_the_list(self) -> None:
        totals = {row["cause"]: row["count"] for row in self.life.status["restarts"]}
        listed = Counter(cause for (cause,) in self.life.attempts("cause") if cause and cause != "Completed")
        assert all(totals[cause] >= count for cause, count in listed.items())
        if self.life.status.get("totalAttempts", 0) <= 20:
            assert totals == listed

    @invariant()
    def nothing_is_told_twice(self) -> None:
        once = [line for line in self.life.told if line.split(":")[0] in {"Restarting", "Complete", "Failed"}]
        assert len(once) == len(set(once))
        running = [line for line in self.life.told if line.startswith("Running: runs")]
        assert len(running) <= 1 + sum(line.startswith(("Resumed", "Restarting")) for line in self.life.told)

    @invariant()
    def conditions_keep_their_order_and_their_sense(self) -> None:
        kinds = [condition["type"] for condition in self.life.status["conditions"]]
        assert kinds == [kind for kind in ORDER if kind in kinds]
        true = {c["type"] for c in self.life.status["conditions"] if c["status"] == "True"}
        assert len(true & {"Running", "Suspended", "Complete", "Failed"}) <= 1
        assert ("Stalled" in true) == ("Failed" in true)
        state = self.life.status["state"]
        assert (state in {"Running", "Publishing"}) == ("Running" in true)
        assert ("Reconciling" in true) == (state not in {"Complete", "Failed", "Suspended"})

    @invariant()
    def the_status_reads_back_as_it_was_written(self) -> None:
        assert dump(status_before(self.life.resource)) == self.life.status


def apply_patch(target: Any, patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7386."""
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = apply_patch(result.get(name), value) if isinstance(value, dict) else value
    return result


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


ENDS = {
    "in place": "RankKilled",
    "killed": "RankKilled",
    "evicted": "Drained",
    "storage": "StorageUnavailable",
    "vanished": "PodDeleted",
    "suspended": "Suspended",
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(ENDS)), st.integers(0, NODES - 1)), min_size=1, max_size=12))
def test_a_watched_job_has_exactly_the_attempts_that_happened(story: list[tuple[str, int]]) -> None:
    world = Cluster()
    world.begin(restarts=1000)
    world.everything_recovers()
    world.looks()
    for how, index in story:
        world.time_passes(15)
        world.looks()
        if how == "in place":
            world.the_ranks_are_restarted_in_place(ExitClass.RANK_KILLED, index)
        elif how == "suspended":
            world.the_owner_suspends_or_resumes(True)
            world.looks()
            world.the_owner_suspends_or_resumes(False)
        else:
            world.a_pod_ends(index, how)
        world.looks()
        world.time_passes(1)
        world.everything_recovers()
        world.looks()
    assert world.life.attempts("cause", "gang") == [
        *((ENDS[how], f"g{number}") for number, (how, _) in enumerate(story, 1)),
        (None, f"g{len(story) + 1}"),
    ]
    world.training_finishes()
    world.looks()
    assert world.life.attempts("cause")[-1] == ("Completed",)
    assert world.life.status["totalAttempts"] == len(story) + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["in place", "storage"]), st.integers(0, 1)), min_size=1, max_size=5))
def test_an_operator_that_slept_finds_the_same_ledger(story: list[tuple[str, int]]) -> None:
    """What launchers and dead pods still tell; a pod that vanished unseen cannot be known."""
    awake, asleep = Cluster(), Cluster()
    for world in (awake, asleep):
        world.begin(restarts=1000)
        world.everything_recovers()
        for how, index in story:
            world.time_passes(15)
            if world is awake:
                world.looks()
            if how == "in place":
                world.the_ranks_are_restarted_in_place(ExitClass.RANK_KILLED, index)
            else:
                world.a_pod_ends(index, how)
            world.time_passes(1)
            world.everything_recovers()
        world.looks()
    names = ("number", "endedAt", "cause", "exitCode", "gang", "lastStep")
    assert asleep.life.attempts(*names) == awake.life.attempts(*names)
