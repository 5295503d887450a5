"""What the operator does and leaves alone, on a real API server with a real Job controller."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.apiserver.kube import Document, Kube, wait
from tests.apiserver.life import LIVES, NAME, Life, job
from tests.apiserver.operator_process import OperatorProcess, settings
from tests.apiserver.proxy import Seen
from tests.apiserver.server import REPOSITORY, RunningServer, binary
from tests.apiserver.stage import Stage, stage


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
        there.quiet(1)
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
    wait(lambda: not there.quiet(0.7), "nothing is written any more")
    assert there.operator.stop() == 0
    before = len(there.proxy.seen)
    there.operator.start()
    there.watching(2)
    other = job()
    other["metadata"]["name"] = "other"
    created = time.monotonic()
    there.kube.create(other)
    there.kube.wait(lambda: there.kube.find("Job", "ftj-other"), "a new job is served")
    print(f"a new job is served {time.monotonic() - created:.2f} s after its creation")
    there.kube.delete("FineTuneJob", "other")
    time.sleep(1)
    about = [one for one in there.proxy.seen[before:] if one.path.rstrip("/").split("/")[-1].endswith(NAME)]
    assert [one for one in there.proxy.writes if one.at > created and f"/{NAME}/status" in one.path] == []
    assert about == []


def test_a_restart_writes_nothing_to_a_job_that_runs_undisturbed(there: Stage) -> None:
    life = _running(there)
    there.quiet(2)
    job_before, status = there.kube.get("Job", f"ftj-{NAME}"), life.status
    assert there.operator.stop() == 0
    before = len(there.proxy.writes)
    there.operator.start()
    there.watching(2)
    time.sleep(4)
    assert {_word(one) for one in there.proxy.writes[before:]} <= {"PATCH finetunejobs/status"}
    assert there.kube.get("Job", f"ftj-{NAME}")["metadata"]["generation"] == job_before["metadata"]["generation"]
    assert [attempt.number for attempt in life.status.attempts] == [attempt.number for attempt in status.attempts]


def test_a_finished_job_is_removed_when_its_time_is_over(there: Stage) -> None:
    life = _running(there)
    there.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 2}}})
    life.complete("gang-1")
    there.kube.wait(lambda: there.kube.find("FineTuneJob", NAME) is None, "the job is removed", 10)
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
        started = time.monotonic()
        assert first.stop() == 0
        there.kube.wait(lambda: holder() not in {"", name}, "the second replica holds the lease")
        released = time.monotonic() - started
        name = holder()
        third = replica("third")
        there.kube.wait(lambda: "standing by" in third.log, "the third replica stands by")
        started = time.monotonic()
        second.kill()
        there.kube.wait(lambda: holder() != name, "the third replica holds the lease", 40)
        taken = time.monotonic() - started
        there.kube.create(job())
        there.kube.wait(lambda: there.kube.find("Job", f"ftj-{NAME}"), "the third replica works")
        third.stop()
        assert released < 3
        assert taken < 16


# ---- rights ----------------------------------------------------------------------------------------------------------


def _chart(namespace: str) -> list[Document]:
    """The chart's RBAC for an operator that watches its own namespace only."""
    command = [binary("helm"), "template", "release", REPOSITORY / "charts" / "finetune-operator"]
    command += ["--namespace", namespace, "--set", f"namespaces={{{namespace}}}", "--kube-version", "v1.36.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kinds = {"Role", "RoleBinding", "ServiceAccount"}
    found = [item for item in yaml.safe_load_all(done.stdout) if item and item["kind"] in kinds]
    return [item for item in found if "helm.sh/hook" not in item["metadata"].get("annotations", {})]


def _granted(items: list[Document]) -> set[tuple[str, str]]:
    return {
        (f"{resource}.{group}".strip("."), verb)
        for item in items
        if item["kind"] == "Role"
        for rule in item["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_rights_of_the_chart_are_used_and_enough(job_server: RunningServer, tmp_path: Path) -> None:
    with stage(job_server, tmp_path, lease={"enabled": True, "namespace": "x"}) as there:
        namespace = there.kube.namespace
        items = _chart(namespace)
        for item in items:
            there.kube.apply(item)
        account = next(item["metadata"]["name"] for item in items if item["kind"] == "ServiceAccount")
        kubeconfig = job_server.write_kubeconfig(
            tmp_path / "account", token=there.kube.account_token(account), url=there.proxy.url, namespace=namespace
        )
        lease = {"enabled": True, "namespace": namespace, "name": "finetune-operator"}
        operator = OperatorProcess(tmp_path, kubeconfig, settings(namespace, lease=lease))
        operator.start()
        there.watching()
        try:
            LIVES["suspended"](Life(there.kube, there.kubelet))
            there.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 0}}})
        finally:
            assert operator.stop() == 0
        used = _requests_of(job_server, f"system:serviceaccount:{namespace}:{account}")
        assert {request: code for request, code in used.items() if code == 403} == {}
        granted = _granted(items)
        assert set(used) - granted == set()
        print(f"granted and not used in this life: {sorted(granted - set(used))}")


def _requests_of(server: RunningServer, user: str) -> dict[tuple[str, str], int]:
    """(resource, verb) -> the worst answer."""
    found: dict[tuple[str, str], int] = {}
    for entry in server.audit():
        if entry["user"]["username"] != user or "objectRef" not in entry:
            continue
        reference = entry["objectRef"]
        resource = reference["resource"] + (f"/{reference['subresource']}" if "subresource" in reference else "")
        key = (f"{resource}.{reference.get('apiGroup', '')}".strip("."), entry["verb"])
        found[key] = max(found.get(key, 0), entry.get("responseStatus", {}).get("code", 0))
    return found


def test_four_requests_until_a_job_runs(there: Stage) -> None:
    """Three children and one status; a job whose pods need more than 3 s says before what it waits for."""
    there.quiet(1)
    before = len(there.proxy.seen)
    life = Life(there.kube, there.kubelet)
    there.kubelet.page = lambda index: life.page(index, gang="gang-1", step=1)
    there.kube.create(job())
    life.until_state("Running")
    seen = [one for one in there.proxy.seen[before:] if not one.is_watch]
    counted = Counter(_word(one) for one in seen if one.is_write and one.resource != "events")
    waited = int("GET pods" in {_word(one) for one in seen})  # on a slow machine
    assert counted == {
        "POST configmaps": 1,
        "POST services": 1,
        "POST jobs": 1,
        "PATCH finetunejobs/status": 1 + waited,
    }


def _word(one: Seen) -> str:
    return f"{one.method} {one.resource}"
