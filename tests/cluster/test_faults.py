"""What breaks while two real nodes train: every job completes, tells what happened, and its adapter is the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.cluster.cluster import LocalCluster, wait_for
from tests.cluster.workshop import (
    CHART,
    EVERY,
    GRACE_SECONDS,
    RELEASE,
    SYSTEM,
    Adapter,
    Workshop,
    helm,
    installed,
    operator_pod,
    rank_process,
    steps,
)


class Story:
    """One job, from `kubectl apply` past its first checkpoint; ``seconds`` and steps of every recovery are printed."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        shop.submit(shop.long_job())
        shop.wait_step("job", EVERY + 5)
        self.struck = time.monotonic()

    def strike(self) -> None:
        """The fault comes now."""
        self.struck = time.monotonic()

    def until_attempt(self, number: int, seconds: float = 240) -> None:
        """Until this attempt has trained beyond the checkpoint it resumed from."""

        def trains() -> bool:
            status = self.shop.status("job")
            assert status.get("state") not in {"Failed", "Complete"}, f"attempt {number} is over"
            last = status["attempts"][-1]
            resumed = last.get("resumedFromStep")
            step = status.get("progress", {}).get("step", 0)
            return last["number"] >= number and resumed is not None and "endedAt" not in last and step > resumed

        self.shop.until("job", f"does not train in attempt {number}", trains, seconds)
        print(f"attempt {number} trains {time.monotonic() - self.struck:.1f} s after the fault")

    def complete(self) -> dict[str, Any]:
        status = self.shop.wait("job", "Complete")
        for attempt in status["attempts"]:
            print(
                {name: attempt.get(name) for name in ("cause", "resumedFromStep", "lastStep", "lostSteps", "message")}
            )
        return status


def facts(status: dict[str, Any], *fields: str) -> list[tuple[Any, ...]]:
    """Of every attempt these fields."""
    return [tuple(attempt.get(field) for field in fields) for attempt in status["attempts"]]


def whole_checkpoints(status: dict[str, Any]) -> bool:
    """Whether every later attempt resumed from a checkpoint that the one before had reached, and the cost is told."""
    attempts = status["attempts"]
    return not attempts[0].get("resumedFromStep") and all(
        0 < later["resumedFromStep"] <= earlier["lastStep"]
        and earlier["lostSteps"] == earlier["lastStep"] - later["resumedFromStep"] <= EVERY + 1
        for earlier, later in itertools.pairwise(attempts)
    )


def uids(shop: Workshop) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in shop.pods("job")}


@contextlib.contextmanager
def kept(shop: Workshop, pod: str) -> Iterator[None]:
    """A pod that ends stays visible: Kubernetes may forget it between two looks, and then nobody knows its name."""
    words = ["patch", "pod", pod, "-n", shop.namespace]
    one_more = [{"op": "add", "path": "/metadata/finalizers/-", "value": "finetune.dev/test"}]
    shop.cluster.kubectl(*words, "--type=json", "--patch", json.dumps(one_more))
    try:
        yield
    finally:
        shop.cluster.kubectl(*words, "--type=merge", "--patch", '{"metadata": {"finalizers": null}}', check=False)


def process_of(cluster: LocalCluster, uid: str) -> list[int]:
    """Processes of a pod that live on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if uid in (path / "cgroup").read_text() and b"finetune" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def test_a_killed_rank_restarts_in_place_and_deleted_pods_are_replaced(
    fault_shop: Workshop, calm: Adapter, tmp_path: Path
) -> None:
    cluster, story = fault_shop.cluster, Story(fault_shop)

    before = uids(fault_shop)
    second = fault_shop.pod("job", 1)["metadata"]["name"]
    story.strike()
    os.kill(rank_process(cluster, fault_shop.pod("job", 1)), signal.SIGKILL)
    story.until_attempt(2)
    assert uids(fault_shop) == before, "no pod was replaced"

    first = fault_shop.pod("job", 0)["metadata"]["name"]
    story.strike()
    with kept(fault_shop, first):
        cluster.kubectl("delete", "pod", first, "-n", fault_shop.namespace, "--wait=false")
        story.until_attempt(3)

    third = fault_shop.pod("job", 1)["metadata"]["name"]
    story.strike()
    cluster.kubectl("delete", "pod", third, "-n", fault_shop.namespace, "--grace-period=0", "--force")
    story.until_attempt(4)

    status = story.complete()
    assert facts(status, "cause", "pod", "message")[:2] == [
        ("RankKilled", second, "rank 1 was killed by SIGKILL"),
        ("PodDeleted", first, f"pod {first} was deleted"),
    ]
    assert facts(status, "cause")[2:] == [("PodDeleted",), ("Completed",)]
    assert whole_checkpoints(status), status["attempts"]
    assert status["attempts"][1]["lostSteps"] == 0, "a pod that is asked to go writes a checkpoint first"
    assert fault_shop.adapter(status, tmp_path / "artifact") == calm


def test_a_node_without_power_is_replaced_and_comes_back(fault_shop: Workshop, calm: Adapter, tmp_path: Path) -> None:
    cluster, story = fault_shop.cluster, Story(fault_shop)
    lost = on_n2(fault_shop)
    story.strike()
    cluster.power_off("n2")
    until_replaced(fault_shop, lost)
    print(f"pod {lost['metadata']['name']} is replaced {time.monotonic() - story.struck:.1f} s after the power cut")
    cluster.boot("n2")
    story.until_attempt(2)

    status = story.complete()
    told_of_the_node(status, lost)
    assert fault_shop.adapter(status, tmp_path / "artifact") == calm


def test_a_node_that_is_cut_off_until_its_pod_is_evicted_gives_it_up(
    fault_shop: Workshop, calm: Adapter, tmp_path: Path
) -> None:
    cluster, story = fault_shop.cluster, Story(fault_shop)
    lost = on_n2(fault_shop)
    uid = lost["metadata"]["uid"]
    story.strike()
    cluster.cut("n2")
    until_replaced(fault_shop, lost)
    assert process_of(cluster, uid), "the pod lives on behind the partition"
    cluster.heal("n2")
    wait_for(lambda: not process_of(cluster, uid), 90, "the node does not end the pod that was replaced")
    print(f"the pod behind the partition has ended {time.monotonic() - story.struck:.1f} s after the cut")
    story.until_attempt(2)

    status = story.complete()
    told_of_the_node(status, lost)
    assert fault_shop.adapter(status, tmp_path / "artifact") == calm


def on_n2(shop: Workshop) -> dict[str, Any]:
    """The pod on the node that tests break."""
    (pod,) = (pod for pod in shop.pods("job") if pod["spec"]["nodeName"] == "n2")
    return pod


def until_replaced(shop: Workshop, lost: dict[str, Any]) -> None:
    """Until the operator has removed the pod (nobody else would) and its Job has made another with the same index."""
    index = "batch.kubernetes.io/job-completion-index"

    def replaced() -> bool:
        found = {pod["metadata"]["uid"]: pod["metadata"]["labels"][index] for pod in shop.pods("job")}
        return lost["metadata"]["uid"] not in found and lost["metadata"]["labels"][index] in found.values()

    shop.until("job", f"has {lost['metadata']['name']} still, or no pod in its place", replaced, 150)


def told_of_the_node(status: dict[str, Any], lost: dict[str, Any]) -> None:
    name = lost["metadata"]["name"]
    assert facts(status, "cause", "pod", "node")[0] == ("NodeLost", name, "n2")
    message = status["attempts"][0]["message"]
    given_up = f"pod {name} was given up because node n2 has not confirmed its end 10 s after its grace period"
    # if everything is so slow that the ranks on n1 end first, the pod on n2 is why
    assert message == given_up or message.startswith(f"pod {name} was lost with node n2: "), message
    assert facts(status, "cause")[1:] == [("Completed",)]
    assert whole_checkpoints(status), status["attempts"]


def test_neither_a_short_partition_nor_lost_storage_nor_a_dead_operator_nor_an_upgrade_costs_an_attempt(
    fault_shop: Workshop, calm: Adapter, tmp_path: Path
) -> None:
    """Training waits at its next checkpoint while storage is away, so the operator's troubles fall into its life."""
    cluster, story = fault_shop.cluster, Story(fault_shop)
    before = uids(fault_shop)
    cluster.cut("n2")
    time.sleep(5)
    cluster.heal("n2")

    cluster.stop_s3()
    stopped = time.monotonic()
    back = threading.Timer(45, cluster.start_s3)  # ranks that wait for each other give up after 60 s
    back.start()

    def have_storage_back() -> None:
        back.cancel()
        back.join()
        if not cluster.s3_runs():
            cluster.start_s3()

    with contextlib.ExitStack() as ends:
        ends.callback(have_storage_back)
        ends.enter_context(new_operator(cluster))
        time.sleep(max(0.0, stopped + 30 - time.monotonic()))
        step = int(fault_shop.status("job")["progress"]["step"])
        story.strike()
        have_storage_back()
        print(f"storage was away for {story.struck - stopped:.1f} s, training waits at step {step}")
        fault_shop.wait_step("job", step + 2 * EVERY)
        print(f"the new operator sees it go on {time.monotonic() - story.struck:.1f} s later")
        status = story.complete()
    assert uids(fault_shop) == before, "no training pod was started again"
    assert facts(status, "cause", "lastStep") == [("Completed", steps())]
    assert fault_shop.adapter(status, tmp_path / "artifact") == calm


@contextlib.contextmanager
def new_operator(cluster: LocalCluster) -> Iterator[None]:
    """SIGKILL, and when it is back an upgrade with another default for training pods; rolled back at the end."""
    old = operator_pod(cluster)
    for process in process_of(cluster, old["metadata"]["uid"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_for(
        lambda: restarts(operator_pod(cluster)) > restarts(old), 60, "the operator does not come back after SIGKILL"
    )

    values = f"training.terminationGracePeriodSeconds={GRACE_SECONDS + 1},podAnnotations.example\\.org/upgrade=yes"
    place = ["--namespace", SYSTEM, "--wait", "--timeout", "120s"]
    mark = installed(cluster)
    known = mark.read_text()
    mark.unlink()  # if this run is killed now, the next one installs again
    try:
        helm(cluster, "upgrade", RELEASE, str(CHART), "--reuse-values", "--set", values, *place)
        assert operator_pod(cluster)["metadata"]["uid"] != old["metadata"]["uid"], "the operator was replaced"
        yield
    finally:
        helm(cluster, "rollback", RELEASE, *place)
        mark.write_text(known)


def restarts(pod: dict[str, Any]) -> int:
    return sum(int(status["restartCount"]) for status in pod["status"].get("containerStatuses", ()))
