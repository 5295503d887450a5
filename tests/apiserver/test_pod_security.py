"""Every child of every shape of job is taken by a real API server, in a namespace that enforces `restricted`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.apiserver.kube import Document, Kube, Refused
from tests.apiserver.kubelet import Kubelet, index_of
from tests.unit.operator.build_shapes import SETTINGS, SHAPES, children, examples, planned, smallest

from finetune_api.errors import SpecError
from finetune_api.exits import Cause, ExitClass
from finetune_api.report import Termination
from finetune_api.validation import Place, parse_spec
from finetune_operator.build import Children, build_children
from finetune_operator.policy import policy_problems

JOBS: dict[str, tuple[Document, Any]] = {
    **SHAPES,
    **{f"example {name}": (job["spec"], SETTINGS) for name, job in examples()},
}
CANARY = "canary-4f1c2a9b7d"


@pytest.fixture(autouse=True)
def classes(request: pytest.FixtureRequest) -> None:
    """The priority and runtime classes that a shape names; pods are refused without them. Shared by all tests."""
    name = "kube" if "kube" in request.fixturenames else "job_kube"
    kube: Kube = request.getfixturevalue(name)
    for priority in ("batch", "urgent"):
        item = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 1}
        _make(kube, kube.path("PriorityClass"), {**item, "metadata": {"name": priority}})
    runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "nvidia"}
    _make(kube, "/apis/node.k8s.io/v1/runtimeclasses", {**runtime, "metadata": {"name": "nvidia"}})


@pytest.mark.parametrize("name", JOBS)
def test_a_restricted_namespace_takes_every_child_and_every_pod(kube: Kube, name: str) -> None:
    spec, settings = JOBS[name]
    built = children(spec, settings, namespace=kube.namespace)
    for manifest in built.manifests:
        assert kube.create(manifest, dryRun="All")["metadata"]["name"] == manifest["metadata"]["name"]
        assert kube.apply(manifest, dryRun="All")["metadata"]["name"] == manifest["metadata"]["name"]
    assert kube.create(pod_of(built), dryRun="All")["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("name", JOBS)
def test_what_is_stored_is_what_was_built(kube: Kube, name: str) -> None:
    """Nothing of a child is dropped, renamed or merged by the API server: what it adds are defaults."""
    spec, settings = JOBS[name]
    for manifest in children(spec, settings, namespace=kube.namespace).manifests:
        assert missing(manifest, kube.apply(manifest, dryRun="All")) == []


def test_the_longest_name_and_the_largest_gang_are_taken(kube: Kube) -> None:
    spec = smallest(distributed={"nodes": 4096}, training={"globalBatchSize": 4096})
    built = children(spec, name="a" * 50, namespace=kube.namespace)
    taken = [kube.create(manifest, dryRun="All") for manifest in built.manifests]
    assert [one["metadata"]["name"] for one in taken] == [one["metadata"]["name"] for one in built.manifests]
    assert taken[-1]["spec"]["completions"] == 4096


def test_what_the_policy_lets_pass_the_api_server_takes(kube: Kube) -> None:
    """Words of every kind where a user may write a name: nothing that is accepted may be refused later."""
    words = (
        "a",
        "a.b",
        "a/b",
        "a.b/c_D.e",
        "A",
        "-a",
        "a-",
        "a_b",
        "_",
        "a..b",
        "a//b",
        "/a",
        "a/",
        "é",
        "a b",
        "kubernetes.io/a",
    )
    taken, refused = [], []
    for word in (*words, *(f"{word * 70}" for word in ("a", "a/", "a."))):
        for block in placements(word):
            spec = smallest(distributed={"nodes": 2}, **block)
            try:
                typed = parse_spec(spec, place=Place.CLUSTER)
            except SpecError:
                continue
            if policy_problems(typed, SETTINGS):
                refused.append(block)
                continue
            kube.create(children(spec, namespace=kube.namespace).job, dryRun="All")
            taken.append(block)
    assert (len(taken) > 40, len(refused) > 40) == (True, True)


def placements(word: str) -> Iterator[Document]:
    """A spec's blocks with ``word`` in each place that holds a name of the cluster."""
    yield {"placement": {"nodeSelector": {word: "x"}}}
    yield {"placement": {"nodeSelector": {"x": word[:63]}}}
    yield {"placement": {"tolerations": [{"key": word, "operator": "Exists"}]}}
    yield {"placement": {"tolerations": [{"key": "x", "value": word[:63]}]}}
    yield {"placement": {"tolerations": [{"value": word[:63], "effect": "NoExecute", "tolerationSeconds": 1}]}}
    yield {"placement": {"topologyKey": word}}
    yield {"placement": {"schedulerName": word}}
    yield {"placement": {"priorityClassName": word}}
    yield {"resources": {"accelerator": {"resourceName": word}}}
    yield {"resources": {"accelerator": {"resourceName": f"{word}/gpu"}}}
    yield {"model": {"uri": f"pvc://{word}/x"}}


def _pod(change: Callable[[Document], Any]) -> Callable[[Document], Any]:
    return lambda pod: change(pod["spec"])


def _container(change: Callable[[Document], Any]) -> Callable[[Document], Any]:
    return lambda pod: change(pod["spec"]["containers"][0]["securityContext"])


WEAKENED: dict[str, tuple[Callable[[Document], Any], str]] = {
    "root": (_pod(lambda spec: spec["securityContext"].update(runAsUser=0)), "runAsUser=0"),
    "any user": (_pod(lambda spec: spec["securityContext"].pop("runAsNonRoot")), "runAsNonRoot != true"),
    "no seccomp": (_pod(lambda spec: spec["securityContext"].pop("seccompProfile")), "seccompProfile"),
    "host network": (_pod(lambda spec: spec.update(hostNetwork=True)), "host namespaces"),
    "host path": (
        _pod(lambda spec: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
        "restricted volume types",
    ),
    "escalation": (
        _container(lambda security: security.update(allowPrivilegeEscalation=True)),
        "allowPrivilegeEscalation != false",
    ),
    "capabilities": (_container(lambda security: security.pop("capabilities")), "unrestricted capabilities"),
}


@pytest.mark.parametrize("name", WEAKENED)
def test_the_namespace_really_refuses_what_is_weaker(kube: Kube, name: str) -> None:
    change, words = WEAKENED[name]
    pod = pod_of(children(smallest(), namespace=kube.namespace))
    change(pod)
    with pytest.raises(Refused) as caught:
        kube.create(pod, dryRun="All")
    assert caught.value.code == 403
    assert 'violates PodSecurity "restricted:latest"' in caught.value.message
    assert words in caught.value.message


def test_the_pods_that_the_job_controller_makes_are_ours(job_kube: Kube) -> None:
    spec = smallest(distributed={"nodes": 2}, output={"uri": "s3://out/x", "credentials": {"secretName": "bucket"}})
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bucket"}}
    job_kube.create({**secret, "stringData": {"AWS_SECRET_ACCESS_KEY": CANARY}})
    with applied(job_kube, spec):
        pods = job_kube.wait(lambda: _when(job_kube.list("Pod"), 2), "the Job controller has made two pods")
        assert [pod["spec"]["hostname"] for pod in pods] == ["ftj-job-0", "ftj-job-1"]
        assert {pod["spec"]["subdomain"] for pod in pods} == {"ftj-job"}
        assert {pod["metadata"]["labels"]["finetune.dev/job"] for pod in pods} == {"job"}
        for pod in pods:
            # No token is mounted, and what was declared is all that can be written.
            assert sorted(volume["name"] for volume in pod["spec"]["volumes"]) == ["config", "shm", "tmp", "work"]
            names = [entry["name"] for entry in pod["spec"]["containers"][0]["env"]]
            assert "JOB_COMPLETION_INDEX" in names
        stored = [*pods, *(item for kind in ("Job", "Service", "ConfigMap") for item in job_kube.list(kind))]
        assert CANARY not in str(stored)


@pytest.mark.parametrize("exit_class", [e for e in ExitClass if e.cause is Cause.USER])
def test_an_error_of_the_user_ends_the_job_at_once(job_kube: Kube, exit_class: ExitClass) -> None:
    with applied(job_kube, smallest(distributed={"nodes": 2})), Kubelet(job_kube).running() as kubelet:
        job_kube.wait(lambda: _when(kubelet.pods(), 2), "both pods exist")
        job_kube.wait(lambda: kubelet.pod(1)["status"].get("phase") == "Running", "the second pod runs")
        kubelet.end(1, Termination(exit_class=exit_class, exit_code=exit_class.code, message="x"))
        failed = job_kube.wait(lambda: _condition(job_kube, "FailureTarget"), "the Job has failed")
        assert failed["reason"] == "PodFailurePolicy"


def test_infrastructure_trouble_brings_a_new_pod_and_costs_the_gang_one_pause_not_one_per_pod(job_kube: Kube) -> None:
    """Two pods fail together: with one count for the whole Job the pause would be 20 s, with one per index it is 10."""
    lost = ExitClass.COMMUNICATION_FAILED
    with applied(job_kube, smallest(distributed={"nodes": 2})), Kubelet(job_kube).running() as kubelet:
        job_kube.wait(lambda: _all_run(kubelet, 2), "both pods run")
        before = {pod["metadata"]["uid"] for pod in kubelet.pods()}
        for index in (0, 1):
            kubelet.end(index, Termination(exit_class=lost, exit_code=lost.code, message="peer lost"))
        job_kube.wait(lambda: _all_run(kubelet, 2), "both pods were replaced")
        after = kubelet.pods()
        counts = [pod["metadata"]["annotations"]["batch.kubernetes.io/job-index-failure-count"] for pod in after]
        assert counts == ["1", "1"]
        assert before.isdisjoint(pod["metadata"]["uid"] for pod in after)
        assert [index_of(pod) for pod in after] == [0, 1]
        assert _condition(job_kube, "FailureTarget") is None


def test_an_eviction_is_not_counted(job_kube: Kube) -> None:
    with applied(job_kube, smallest()), Kubelet(job_kube).running() as kubelet:
        job_kube.wait(lambda: _all_run(kubelet, 1), "the pod runs")
        kubelet.evict(0, "The node was low on resource: memory.")
        job_kube.wait(lambda: _all_run(kubelet, 1), "the pod was replaced")
        annotations = kubelet.pod(0)["metadata"]["annotations"]
        assert annotations["batch.kubernetes.io/job-index-failure-count"] == "0"
        assert annotations["batch.kubernetes.io/job-index-ignored-failure-count"] == "1"


@contextmanager
def applied(kube: Kube, spec: Document) -> Iterator[Children]:
    """A real FineTuneJob and its children."""
    item = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "job"}, "spec": spec}
    job = kube.create(item)
    built = build_children(job, *planned(job), SETTINGS)
    for manifest in built.manifests:
        kube.apply(manifest)
    yield built


def pod_of(built: Children) -> Document:
    """The pod that a Job makes from its template, without the names that only the Job controller gives."""
    template = copy.deepcopy(built.job["spec"]["template"])
    metadata = {**template["metadata"], "name": "pod", "namespace": built.job["metadata"]["namespace"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def missing(built: Any, stored: Any, path: str = "") -> list[str]:
    """Paths whose value was built but not stored; what is only stored are defaults."""
    if isinstance(built, dict) and isinstance(stored, dict):
        return [found for key, value in built.items() for found in missing(value, stored.get(key), f"{path}.{key}")]
    if isinstance(built, list) and isinstance(stored, list) and len(built) == len(stored):
        pairs = enumerate(zip(built, stored, strict=True))
        return [found for index, (one, other) in pairs for found in missing(one, other, f"{path}[{index}]")]
    if built == "" and stored is None:  # an empty word is kept as none
        return []
    return [] if built == stored else [f"{path}: {built!r} became {stored!r}"]


def _make(kube: Kube, path: str, item: Document) -> None:
    answer = kube.call("POST", path, item)
    assert answer.code in {201, 409}, answer.body


def _when(items: list[Document], count: int) -> list[Document] | None:
    return sorted(items, key=index_of) if len(items) == count else None


def _all_run(kubelet: Kubelet, count: int) -> bool:
    return [pod["status"].get("phase") for pod in kubelet.pods()] == ["Running"] * count


def _condition(kube: Kube, kind: str) -> Document | None:
    conditions = kube.get("Job", "ftj-job")["status"].get("conditions", [])
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)
