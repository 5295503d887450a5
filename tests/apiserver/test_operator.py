"""What the operator does and leaves alone, on a real API server with a real Job controller."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.apiserver.kube import Kube, wait
from tests.apiserver.life import LIVES, NAME, Life, events_of, job
from tests.apiserver.operator_process import OperatorProcess, settings
from tests.apiserver.proxy import Seen, hanging
from tests.apiserver.server import RunningServer
from tests.apiserver.stage import Stage, stage

from finetune_operator.kube import PROGRESS_MANAGER


@pytest.fixture
def there(job_server: RunningServer, tmp_path: Path) -> Iterator[Stage]:
    with stage(job_server, tmp_path) as running:
        running.operator.start()
        running.watching()
        yield running


def _condition(kube: Kube, name: str, kind: str) -> dict[str, Any] | None:
    conditions = kube.get("FineTuneJob", name).get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == kind), None)


def _running(there: Stage) -> Life:
    """A job that trains at step 5."""
    life = Life(there.kube, there.kubelet)
    there.kubelet.page = lambda index: life.page(index)
    there.kubelet.last_words = life.interrupted("gang-1", 5)
    there.kube.create(job())
    life.until_pods_run()
    life.train("gang-1", 5)
    return life


def test_a_job_that_the_administrator_forbids_is_refused_once_with_every_problem(
    job_server: RunningServer, tmp_path: Path
) -> None:
    with stage(job_server, tmp_path, uris={"schemes": ["s3"]}) as there:
        there.operator.start()
        there.watching()
        there.kube.create(job(output={"uri": "gs://out"}, model={"uri": "s3://models/base/", "trustRemoteCode": True}))
        there.kube.wait(lambda: _condition(there.kube, NAME, "Accepted"), "the job was judged")
        accepted = _condition(there.kube, NAME, "Accepted")
        assert accepted is not None
        assert accepted["status"] == "False"
        assert "spec.model.trustRemoteCode" in accepted["message"]
        assert "spec.output.uri" in accepted["message"]
        assert there.kube.get("FineTuneJob", NAME)["status"]["state"] == "Invalid"
        there.kube.wait(lambda: events_of(there.kube), "it is told", 60)
        wait(lambda: not there.quiet(1), "nothing is written any more", 60)
        before = len(there.proxy.seen)
        time.sleep(3)
        assert there.proxy.seen[before:] == []
        assert (there.kube.list("Job"), there.kube.list("Service")) == ([], [])


def test_a_job_goes_with_all_its_children_while_it_runs(there: Stage) -> None:
    _running(there)
    there.kube.delete("FineTuneJob", NAME)
    there.kube.wait(lambda: there.kube.find("FineTuneJob", NAME) is None, "the job is gone", 2)
    _gone(there.kube)
    assert there.kubelet.errors == []


def test_without_the_operator_a_job_can_still_be_deleted(there: Stage) -> None:
    """No finalizer anywhere: uninstalling leaves nothing that cannot be removed."""
    _running(there)
    assert there.operator.stop() == 0
    for kind in ("FineTuneJob", "Job", "Service", "ConfigMap"):
        assert [item["metadata"].get("finalizers") for item in there.kube.list(kind)] == [None] * len(
            there.kube.list(kind)
        )
    there.kube.delete("FineTuneJob", NAME)
    there.kube.wait(lambda: there.kube.find("FineTuneJob", NAME) is None, "the job is gone", 2)
    _gone(there.kube)


def _gone(kube: Kube) -> None:
    def left() -> list[str]:
        return [
            f"{kind} {item['metadata']['name']}"
            for kind in ("Pod", "Job", "Service", "ConfigMap")
            for item in kube.list(kind)
        ]

    kube.wait(lambda: left() == [], "Pod, Job, Service and ConfigMap are gone")


def test_a_restart_writes_nothing_to_settled_jobs_and_serves_new_ones(there: Stage, tmp_path: Path) -> None:
    LIVES["mistaken"](Life(there.kube, there.kubelet))
    wait(lambda: not there.quiet(0.7), "nothing is written any more", 60)
    assert there.operator.stop() == 0
    before, settled = len(there.proxy.writes), there.kube.get("FineTuneJob", NAME)
    there.operator.start()
    there.watching()
    there.quiet(2)
    assert there.proxy.writes[before:] == []
    other = job()
    other["metadata"]["name"] = "other"
    created = time.monotonic()
    there.kube.create(other)
    there.kube.wait(lambda: there.kube.find("Job", "ftj-other"), "a new job is served")
    print(f"a new job is served {time.monotonic() - created:.2f} s after its creation")
    there.kube.delete("FineTuneJob", "other")
    there.quiet(1)
    written = there.proxy.writes[before:]
    made = Counter(_word(one) for one in written if one.method == "POST" and one.resource != "events")
    assert made == {"POST configmaps": 1, "POST services": 1, "POST jobs": 1}, "of the new one"
    named = {
        name for one in written if one.method != "POST" for name in one.path.split("/") if name in {NAME, f"ftj-{NAME}"}
    }
    assert (named, there.kube.get("FineTuneJob", NAME)) == (set(), settled)


def test_a_restart_writes_nothing_to_a_job_that_runs_undisturbed(there: Stage) -> None:
    life = _running(there)
    wait(lambda: not there.quiet(2), "nothing is written any more", 60)
    job_before, status = there.kube.get("Job", f"ftj-{NAME}"), life.status
    assert there.operator.stop() == 0
    before = len(there.proxy.writes)
    there.operator.start()
    there.watching()
    time.sleep(4)
    written = there.proxy.writes[before:]
    assert [one for one in written if f"fieldManager={PROGRESS_MANAGER}" not in one.query.split("&")] == []
    assert there.kube.get("Job", f"ftj-{NAME}")["metadata"]["generation"] == job_before["metadata"]["generation"]
    assert [attempt.number for attempt in life.status.attempts] == [attempt.number for attempt in status.attempts]


def test_a_finished_job_is_removed_when_its_time_is_over(there: Stage) -> None:
    life = _running(there)
    there.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 2}}})
    life.complete("gang-1")
    there.kube.wait(lambda: there.kube.find("FineTuneJob", NAME) is None, "the job is removed", 60)
    _gone(there.kube)


def test_a_lease_is_let_go_on_sigterm_and_outlives_a_kill(job_server: RunningServer, tmp_path: Path) -> None:
    with ExitStack() as ends, stage(job_server, tmp_path / "a") as there:
        lease = {
            "enabled": True,
            "namespace": there.kube.namespace,
            "durationSeconds": 8,  # the machine is busy with other tests
            "renewDeadlineSeconds": 7,
            "retrySeconds": 1,
        }
        configuration = settings(there.kube.namespace, lease=lease)

        def replica(name: str) -> OperatorProcess:
            folder = tmp_path / name
            folder.mkdir()
            process = OperatorProcess(folder, tmp_path / "a" / "kubeconfig", configuration)
            ends.callback(process.close)
            process.start()
            return process

        def holder() -> str:
            found = there.kube.find("Lease", "finetune-operator")
            return str((found or {"spec": {}})["spec"].get("holderIdentity") or "")

        first = replica("first")
        there.kube.wait(holder, "the first replica holds the lease")
        name = holder()
        second = replica("second")
        there.kube.wait(lambda: "standing by" in second.log, "the second replica stands by")
        there.proxy.inject(hanging(_renews_a_lease, seconds=120, after=True))  # SIGTERM comes amid a renewal
        there.kube.wait(lambda: [one for one in there.proxy.seen if one.fault], "it is renewed and not yet told so")
        assert first.stop() == 0
        there.kube.wait(lambda: holder() not in {"", name}, "the second replica holds the lease")
        leases = [one for one in there.proxy.seen if one.resource == "leases" and one.is_write and one.code == 200]
        assert "" in [one.body["spec"].get("holderIdentity") for one in leases], "it was let go, and did not expire"
        name = holder()
        third = replica("third")
        there.kube.wait(lambda: "standing by" in third.log, "the third replica stands by")
        second.kill()
        there.kube.wait(lambda: holder() != name, "the third replica holds the lease")
        there.kube.create(job())
        there.kube.wait(lambda: there.kube.find("Job", f"ftj-{NAME}"), "the third replica works")
        third.stop()


def _renews_a_lease(seen: Seen) -> bool:
    return (seen.resource, seen.method) == ("leases", "PATCH") and "holderIdentity" not in seen.body["spec"]


# ---- requests --------------------------------------------------------------------------------------------------------


def test_five_requests_until_a_job_runs(there: Stage) -> None:
    """Three children, one status, one event; a job whose pods need more than 3 s says before what it waits for."""
    there.quiet(1)
    before = len(there.proxy.seen)
    life = Life(there.kube, there.kubelet)
    there.kubelet.page = lambda index: life.page(index, gang="gang-1", step=1)
    there.kube.create(job())
    life.until_state("Running")
    there.kube.wait(lambda: "Running" in events_of(there.kube), "it is told that the job runs")
    reasons = len(events_of(there.kube))

    def tellings() -> list[int]:
        return [at for at, one in enumerate(there.proxy.seen) if _word(one) == "POST events"]

    there.kube.wait(lambda: len(tellings()) >= reasons, "the proxy has noted what it has passed on")
    told = max(tellings())
    requests = [one for one in there.proxy.seen[before : told + 1] if not one.is_watch and one.resource != "leases"]
    counted = Counter(_word(one) for one in requests)
    print(dict(counted))
    looks = counted["GET pods"]  # on a slow machine: its pods and complaints about them, a status and an event
    assert sum(counted.values()) <= 5 + 6 * looks, counted
    assert 1 <= counted.pop("PATCH finetunejobs/status") <= 1 + looks
    assert {word: times for word, times in counted.items() if not word.startswith("GET") and word != "POST events"} == {
        "POST configmaps": 1,
        "POST services": 1,
        "POST jobs": 1,
    }


def _word(one: Seen) -> str:
    return f"{one.method} {one.resource}"
