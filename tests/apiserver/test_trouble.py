"""What stands in a job's way on a real API server: an earlier job of its name, a quota, deleted children, no rights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.apiserver.kube import Document, Kube, Refused, wait
from tests.apiserver.life import NAME, Life, events_of, job
from tests.apiserver.manifests import manifest
from tests.apiserver.operator_process import OperatorProcess, settings, wait_stopped
from tests.apiserver.proxy import Fault
from tests.apiserver.server import RunningServer
from tests.apiserver.stage import Stage, stage

from finetune_operator.kube import CONNECTIONS, REQUEST_SECONDS

JOB = f"ftj-{NAME}"


@pytest.fixture
def there(job_server: RunningServer, tmp_path: Path) -> Iterator[Stage]:
    with stage(job_server, tmp_path, uris={"schemes": ["s3"]}) as running:
        running.operator.start()
        running.watching()
        yield running


def _until_message(kube: Kube, words: str) -> Document:
    def told() -> Document | None:
        found = kube.get("FineTuneJob", NAME)
        return found if words in found.get("status", {}).get("message", "") else None

    return kube.wait(told, f"the status says {words!r}", 60)


def _refusal(kube: Kube) -> str:
    """What the API server says to any Job."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "one", "image": "none"}]}
    manifest = {"metadata": {"name": "any"}, "spec": {"template": {"spec": pod}}}
    try:
        kube.apply({"apiVersion": "batch/v1", "kind": "Job", **manifest}, dryRun="All")
    except Refused as error:
        return error.message
    return ""


def _trains(there: Stage, gang: str = "gang-1") -> Life:
    life = Life(there.kube, there.kubelet)
    there.kubelet.page = lambda index: life.page(index)
    there.kubelet.last_words = life.interrupted(gang, 5)
    life.until_pods_run()
    life.train(gang, 5)
    return life


# ---- an earlier job of the same name ---------------------------------------------------------------------------------


def _linger(kube: Kube, stays: bool) -> None:
    """The garbage collector comes late: the Job stays until it is let go."""
    kube.patch("Job", JOB, {"metadata": {"finalizers": ["finetune.dev/test"] if stays else None}})


def test_a_job_made_again_under_its_name_owes_nothing_to_the_one_before(there: Stage) -> None:
    there.kube.create(job())
    _trains(there).complete("gang-1")
    old = there.kube.get("Job", JOB)["metadata"]["uid"]
    _linger(there.kube, True)
    there.kube.delete("FineTuneJob", NAME)
    there.kube.create(job())
    time.sleep(3)
    status = there.kube.get("FineTuneJob", NAME).get("status", {})
    assert (status.get("state"), "artifacts" in status, status.get("attempts")) in [(None, False, None)], status
    _linger(there.kube, False)
    life = _trains(there, "gang-2")
    assert there.kube.get("Job", JOB)["metadata"]["uid"] != old
    assert [attempt.number for attempt in life.status.attempts] == [1]
    life.complete("gang-2")


def test_rules_are_asked_again_for_a_job_made_again_under_its_name(there: Stage) -> None:
    there.kube.create(job())
    _trains(there)
    _linger(there.kube, True)
    there.kube.delete("FineTuneJob", NAME)
    there.kube.create(job(output={"uri": "gs://elsewhere/out"}))
    _until_message(there.kube, "spec.output.uri")
    _linger(there.kube, False)
    there.kube.wait(lambda: there.kube.find("Job", JOB) is None, "the earlier Job is gone")
    there.quiet(2)
    assert (there.kube.find("Job", JOB), there.kube.get("FineTuneJob", NAME)["status"]["state"]) == (None, "Invalid")


# ---- refused, and not by its spec ------------------------------------------------------------------------------------


def test_a_job_refused_for_its_labels_starts_when_they_are_mended(there: Stage) -> None:
    manifest = job()
    manifest["metadata"]["labels"] = {f"finetune.dev/{number}": "x" for number in range(33)}
    there.kube.create(manifest)
    _until_message(there.kube, "metadata.labels: has 33 entries")
    there.kube.patch("FineTuneJob", NAME, {"metadata": {"annotations": {"example.org/else": "no news"}}})
    wait(lambda: not there.quiet(2), "it is judged again, and nothing is written", 60)
    assert there.kube.get("FineTuneJob", NAME)["status"]["state"] == "Invalid"
    there.kube.patch("FineTuneJob", NAME, {"metadata": {"labels": {"finetune.dev/7": None}}})
    _trains(there)
    assert events_of(there.kube)["Invalid"] == 1


def test_a_job_refused_by_the_administrators_rules_starts_when_they_allow_it(there: Stage) -> None:
    there.kube.create(job(output={"uri": "gs://elsewhere/out"}))
    _until_message(there.kube, "spec.output.uri")
    there.operator.stop()
    there.operator.configure(settings(there.kube.namespace, uris={"schemes": ["s3", "gs"]}))
    there.operator.start()
    _trains(there)


# ---- children --------------------------------------------------------------------------------------------------------


def test_a_child_that_a_quota_forbids_is_named_in_the_status_until_it_is_allowed(there: Stage) -> None:
    there.kube.create(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "small"},
            "spec": {"hard": {"count/jobs.batch": "0"}},
        }
    )
    counted = {"hard": {"count/jobs.batch": "0"}, "used": {"count/jobs.batch": "0"}}
    there.kube.patch("ResourceQuota", "small", {"status": counted}, subresource="status")  # nobody else counts here
    there.kube.wait(lambda: "exceeded quota: small" in _refusal(there.kube), "the quota counts")
    there.kube.create(job())
    found = _until_message(there.kube, f"the API server refuses the Job {JOB}")
    assert "exceeded quota: small" in found["status"]["message"]
    assert found["status"]["state"] == "Pending"
    ready = next(c for c in found["status"]["conditions"] if c["type"] == "PodsReady")
    assert (ready["status"], ready["reason"]) == ("False", "ChildRefused")
    there.kube.wait(lambda: events_of(there.kube), "it is told")
    assert events_of(there.kube) == {"Waiting": 1}
    there.kube.delete("ResourceQuota", "small")
    _trains(there)


def test_a_service_and_a_config_map_that_somebody_deleted_are_there_for_the_next_attempt(there: Stage) -> None:
    there.kube.create(job())
    life = _trains(there)
    maps = [item["metadata"]["name"] for item in there.kube.list("ConfigMap") if item["metadata"]["name"][:3] == "ftj"]
    content = there.kube.get("ConfigMap", maps[0])["data"]
    there.kube.delete("ConfigMap", maps[0])
    there.kube.delete("Service", JOB)
    there.kubelet.evict(1, "The node was low on resource: memory.")
    there.kube.wait(lambda: there.kube.find("Service", JOB), "the Service is back", 60)
    there.kube.wait(lambda: there.kube.find("ConfigMap", maps[0]), "the ConfigMap is back", 60)
    assert there.kube.get("ConfigMap", maps[0])["data"] == content
    life.until_pods_run()
    life.train("gang-2", 8, resumed=4)
    there.kube.delete("Job", JOB)


def test_a_job_that_has_ended_gets_no_new_children(there: Stage) -> None:
    there.kube.create(job())
    _trains(there).complete("gang-1")
    for kind in ("Job", "Service"):
        there.kube.delete(kind, JOB)
    there.kube.wait(lambda: there.kube.find("Job", JOB) is None, "the Job is gone")
    there.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 3600}}})
    there.kube.wait(
        lambda: there.kube.get("FineTuneJob", NAME)["status"]["observedGeneration"] == 2, "the change was seen"
    )
    there.quiet(2)
    assert (there.kube.find("Job", JOB), there.kube.find("Service", JOB)) == (None, None)
    assert there.kube.get("FineTuneJob", NAME)["status"]["state"] == "Complete"


# ---- rights, kinds, leases -------------------------------------------------------------------------------------------


def _bind(kube: Kube, namespace: str, account: str) -> None:
    """What the chart's Role grants, more or less."""
    rule = {"apiGroups": ["", "batch", "events.k8s.io", "finetune.dev"], "resources": ["*"], "verbs": ["*"]}
    metadata = {"name": "operator", "namespace": namespace}
    kind = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    kube.create({**kind, "kind": "Role", "metadata": metadata, "rules": [rule]})
    kube.create(
        {
            **kind,
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"},
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": account}],
        }
    )


def test_a_namespace_that_cannot_be_read_does_not_stop_the_others_and_is_served_once_it_can(
    job_server: RunningServer, tmp_path: Path
) -> None:
    with stage(job_server, tmp_path / "a") as here, stage(job_server, tmp_path / "b") as other:
        ours, missing = here.kube.namespace, other.kube.namespace
        _bind(here.kube, ours, account=ours)
        kubeconfig = job_server.write_kubeconfig(
            tmp_path / "kubeconfig", token=here.kube.account_token("default"), namespace=ours
        )
        configuration = settings(ours) | {"namespaces": [missing, ours]}
        operator = OperatorProcess(tmp_path, kubeconfig, configuration)
        try:
            operator.start(again=True)
            here.kube.create(job())
            here.kube.wait(lambda: here.kube.find("Job", JOB), "the other namespace is served", 60)
            assert "the other namespaces are served" in operator.log
            other.kube.create(job())
            _bind(other.kube, missing, account=ours)
            other.kube.wait(lambda: other.kube.find("Job", JOB), "the namespace that appeared is served", 120)
            assert (operator.exits, f"namespace {missing} can be read now" in operator.log) == ([0], True)
        finally:
            operator.close()


def test_the_operator_waits_for_its_crd_and_says_so(job_server: RunningServer, tmp_path: Path) -> None:
    with stage(job_server, tmp_path) as there:
        there.proxy.inject(Fault("404", lambda seen: seen.resource == "finetunejobs", code=404, times=3))
        there.operator.start()
        there.watching()
        assert there.operator.log.count("the CRD finetunejobs.finetune.dev is not installed; install it") == 1
        there.kube.create(job())
        there.kube.wait(lambda: there.kube.find("Job", JOB), "the job is served")


@contextmanager
def _holder(there: Stage, folder: Path) -> Iterator[OperatorProcess]:
    """An operator with a lease that it must renew every eight seconds: the machine is busy with other tests."""
    lease: dict[str, Any] = {"enabled": True, "durationSeconds": 10, "renewDeadlineSeconds": 8, "retrySeconds": 1}
    configuration = settings(there.kube.namespace, lease={**lease, "namespace": there.kube.namespace})
    (folder / "holder").mkdir()
    operator = OperatorProcess(folder / "holder", folder / "kubeconfig", configuration)
    try:
        operator.start()
        there.watching()
        yield operator
    finally:
        operator.close()


def test_a_holder_whose_renewals_hang_stops_before_another_one_may_start(
    job_server: RunningServer, tmp_path: Path
) -> None:
    with stage(job_server, tmp_path) as there, _holder(there, tmp_path) as operator:
        is_renewal = lambda seen: seen.resource == "leases" and seen.is_write  # noqa: E731
        there.proxy.inject(Fault("hang", is_renewal, hang_seconds=REQUEST_SECONDS + 5, times=100))
        wait_stopped(operator, 25)  # well before the first renewal would end
        assert "could not be renewed" in operator.log


def test_a_holder_renews_while_an_admission_webhook_lets_all_other_requests_hang(
    job_server: RunningServer, tmp_path: Path
) -> None:
    with stage(job_server, tmp_path) as there, _holder(there, tmp_path) as operator:
        hang = Fault("hang", lambda seen: seen.resource == "configmaps", hang_seconds=25, times=1000)
        there.proxy.inject(hang)
        for number in range(CONNECTIONS + 5):
            there.kube.create(manifest(name=f"{NAME}-{number}"))
        there.kube.wait(lambda: hang.times <= 1000 - CONNECTIONS, "every connection hangs")
        time.sleep(12)  # longer than the lease lasts
        assert operator.alive
        assert there.kube.get("Lease", "finetune-operator")["spec"]["holderIdentity"]
