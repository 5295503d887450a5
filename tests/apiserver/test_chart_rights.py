"""Rights granted == rights used: lives of jobs with the chart's settings and the chart's rights, and the audit log."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.apiserver.kube import Document, Kube, wait
from tests.apiserver.kubelet import Kubelet
from tests.apiserver.life import LIVES, NAME, Life, job
from tests.apiserver.operator_process import OperatorProcess
from tests.apiserver.server import RunningServer
from tests.chart import RELEASE, render, settings_of

from finetune_operator.ends import FORCE_AFTER_SECONDS

RIGHTS = {"ServiceAccount", "Role", "RoleBinding"}
Use = tuple[str, str]  # verb, group/resource[/subresource]


@contextmanager
def installed(server: RunningServer, folder: Path) -> Iterator[tuple[Kube, OperatorProcess]]:
    """A namespace with the chart's rights, and the operator as its ServiceAccount with the chart's config.json."""
    name = f"chart-{uuid.uuid4().hex[:8]}"
    with Kube(server, namespace=name) as kube:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        documents = render({"namespaces": [name], "progress": {"intervalSeconds": 1}}, namespace=name)
        for document in documents:
            if document["kind"] in RIGHTS:
                kube.apply(document)
        kube.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}})
        token = kube.account_token(RELEASE)
        kubeconfig = server.write_kubeconfig(folder / "kubeconfig", token=token, namespace=name)
        free_ports = {"metrics": {"port": 0}, "health": {"port": 0}}  # several operators on one machine
        operator = OperatorProcess(folder, kubeconfig, settings_of(documents) | free_ports)
        try:
            yield kube, operator
        finally:
            operator.close()
            kube.delete("Namespace", name)


def audited(server: RunningServer, namespace: str) -> Iterator[tuple[Use, str, bool]]:
    """(use, name, whether the rights sufficed) of every request of the operator in ``namespace``."""
    for event in server.audit(f"system:serviceaccount:{namespace}:{RELEASE}"):
        if "objectRef" not in event:
            continue
        target, code = event["objectRef"], event["responseStatus"].get("code", 0)
        resource = f"{target.get('apiGroup') or 'core'}/{target['resource']}"
        resource += f"/{target['subresource']}" if "subresource" in target else ""
        allowed = event["annotations"]["authorization.k8s.io/decision"] == "allow" and code != 403
        yield (event["verb"], resource), target.get("name", ""), allowed
        if event["verb"] == "patch" and code == 201:  # server-side apply made it
            yield ("create", resource), target.get("name", ""), allowed


def granted(documents: list[Document]) -> set[Use]:
    return {
        (verb, f"{group or 'core'}/{resource}")
        for document in documents
        if document["kind"] == "Role"
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def expired(life: Life) -> None:
    """Ended by a fault, and removed when its time is over."""
    LIVES["mistaken"](life)
    life.kube.patch("FineTuneJob", NAME, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 1}}})
    wait(lambda: life.kube.find("FineTuneJob", NAME) is None, "the job is removed")


def lost(life: Life) -> None:
    """A pod on a node whose power is cut is deleted and nobody confirms it: the operator sees to its replacement."""
    with life.kubelet.running():
        life.kubelet.page = lambda index: life.page(index)
        life.kube.create(job())
        life.until_pods_run()
        life.train("gang-1", 5)
        life.until_attempts(1, ended=0)
        pod = life.kubelet.pod(1)["metadata"]
    life.kube.delete("Pod", pod["name"], grace_seconds=1)

    def replaced() -> bool:
        pods = [other["metadata"] for other in life.kube.list("Pod")]
        indices = [(entry["labels"]["batch.kubernetes.io/job-completion-index"], entry["uid"]) for entry in pods]
        return ("1", pod["uid"]) not in indices and "1" in dict(indices)

    wait(replaced, "the Job replaces the pod of the lost node", FORCE_AFTER_SECONDS + 40)


def remade(life: Life) -> None:
    """Suspended from the beginning: its Job is made anew when somebody deletes it, and when its spec changes."""
    life.kube.create(job(runPolicy={"suspend": True}))
    life.until_state("Suspended")
    for act in (
        lambda: life.kube.delete("Job", f"ftj-{NAME}"),
        lambda: life.kube.patch("FineTuneJob", NAME, {"spec": {"checkpoint": {"keep": 7}}}),
    ):
        before = life.kube.get("Job", f"ftj-{NAME}")["metadata"]["uid"]
        act()
        wait(lambda uid=before: _is_made_anew(life, uid), "the Job is made again", 30)  # type: ignore[misc]


def _is_made_anew(life: Life, before: str) -> bool:
    found = life.kube.find("Job", f"ftj-{NAME}")
    return found is not None and found["metadata"]["uid"] != before


PLAYS = {**{name: play for name, play in LIVES.items() if name != "mistaken"}, "expired": expired, "remade": remade}


@dataclass(frozen=True)
class Asked:
    """What the operator asked the API server for in one play."""

    uses: set[Use]
    forbidden: list[tuple[Use, str]]  # with the name of the object


def asked(server: RunningServer, folder: Path, name: str) -> Asked:
    """One play from the start of the operator to its end, and what is in the audit log of it."""
    folder.mkdir()
    with installed(server, folder) as (kube, operator):
        operator.start()
        kubelet = Kubelet(kube)
        if name == "lost":  # its kubelet stops in the middle
            lost(Life(kube, kubelet))
        else:
            with kubelet.running():
                PLAYS[name](Life(kube, kubelet))
        assert operator.stop() == 0  # it lets go of its lease
        requests = list(audited(server, kube.namespace))
    return Asked({use for use, _, _ in requests}, [(use, target) for use, target, allowed in requests if not allowed])


@pytest.mark.timeout(1800)
def test_in_all_lives_of_jobs_every_right_of_the_chart_is_used_and_none_is_missing(
    job_server: RunningServer, tmp_path: Path
) -> None:
    names = ["lost", *PLAYS]  # the longest first
    with ThreadPoolExecutor(len(names)) as pool:
        plays = dict(zip(names, pool.map(lambda name: asked(job_server, tmp_path / name, name), names), strict=True))
    assert {name: play.forbidden for name, play in plays.items() if play.forbidden} == {}
    assert set().union(*(play.uses for play in plays.values())) == granted(render({"namespaces": ["any"]}))
