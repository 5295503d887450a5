"""Rights used are rights granted; `restricted` holds; no secret word is anywhere but in its Secret and its process."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cluster.canary import leaks
from tests.cluster.cluster import LocalCluster
from tests.cluster.lives import ACCOUNT, Lives, lived
from tests.cluster.workshop import SYSTEM

Use = tuple[str, str]  # verb, group/resource[/subresource]


@pytest.fixture(scope="module")
def lives(product: LocalCluster) -> Lives:
    return lived(product)


def test_the_jobs_lived_as_this_page_assumes(lives: Lives) -> None:
    last = lives.seen.of("finetunejobs", "whole")[-1]["status"]
    causes = [attempt.get("cause") for attempt in last["attempts"]]
    assert (causes[0], causes[-2:]) == ("NodeLost", ["Suspended", "Completed"])
    assert last["state"] == "Complete"
    refused = lives.seen.of("finetunejobs", "refused")[-1]["status"]
    assert (refused["state"], refused["attempts"][-1]["cause"]) == ("Failed", "StorageRefused")
    assert lives.seen.states("unclear") == ["Invalid"]


class TestRights:
    def test_nothing_was_refused(self, lives: Lives) -> None:
        """By its rights; a namespace that is being deleted, for example, may refuse what it likes."""
        decision = "authorization.k8s.io/decision"
        requests = [event for event in lives.requests if event["stageTimestamp"] >= lives.operator_began]
        judged = [
            event for event in requests if event.get("responseStatus", {}).get("code") != 429
        ]  # too many: unasked
        assert {event["annotations"][decision] for event in judged} == {"allow"}

    def test_every_granted_right_was_used_and_every_used_one_is_granted(
        self, lives: Lives, product: LocalCluster
    ) -> None:
        used = {
            use
            for event in lives.requests
            for use in uses(event)
            # The Lease is made once; everything else has been asked for by the operator that runs.
            if event["stageTimestamp"] >= lives.operator_began or use[1] == "coordination.k8s.io/leases"
        }
        assert used == granted(product)


def uses(event: dict[str, Any]) -> list[Use]:
    """What a request needs the right for."""
    target = event["objectRef"]
    resource = f"{target.get('apiGroup') or 'core'}/{target['resource']}"
    resource += f"/{target['subresource']}" if "subresource" in target else ""
    made = event["verb"] == "patch" and event["responseStatus"].get("code") == 201  # by server-side apply
    return [(verb, resource) for verb in (event["verb"], *(["create"] if made else []))]


def granted(cluster: LocalCluster) -> set[Use]:
    """Everything that any binding in the cluster grants to the operator's account itself."""
    found: set[Use] = set()
    bindings = [*cluster.list("clusterrolebindings"), *cluster.list("rolebindings", SYSTEM)]
    for binding in bindings:
        subjects = [
            f"system:serviceaccount:{subject.get('namespace')}:{subject['name']}"
            for subject in binding.get("subjects", ())
        ]
        if ACCOUNT not in subjects:
            continue
        role = cluster.get(binding["roleRef"]["kind"], binding["roleRef"]["name"], SYSTEM)
        assert role is not None
        found |= {
            (verb, f"{group or 'core'}/{resource}")
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
    return found


def _rights(pod: dict[str, Any]) -> list[tuple[bool, bool, list[str]]]:
    """Of every container: must not be root, may gain rights, capabilities that are dropped."""
    whole = pod["spec"].get("securityContext", {})
    contexts = [{**whole, **container.get("securityContext", {})} for container in pod["spec"]["containers"]]
    return [(one["runAsNonRoot"], one["allowPrivilegeEscalation"], one["capabilities"]["drop"]) for one in contexts]


class TestPods:
    def test_the_namespace_took_every_pod(self, lives: Lives) -> None:
        complaints = [event["message"] for event in lives.seen.versions["events"] if event["reason"] == "FailedCreate"]
        assert complaints == []
        assert lives.violations == {"jobs/root", "pods/root"}, "the planted ones only"

    def test_nothing_runs_as_root_or_can_gain_rights(self, lives: Lives) -> None:
        pods = {process.pod for process in lives.seen.processes if "finetune_trainer" in process.command}
        assert {"ftj-whole-0", "ftj-whole-1"} <= {pod.rpartition("-")[0] for pod in pods}, "others live for a moment"
        asked = {
            pod["metadata"]["name"].rpartition("-")[0]: _rights(pod)
            for pod in lives.seen.versions["pods"]
            if pod["metadata"]["name"].startswith(("ftj-whole-", "ftj-refused-"))
        }
        assert asked == {pod: [(True, False, ["ALL"])] for pod in ("ftj-whole-0", "ftj-whole-1", "ftj-refused-0")}
        assert [process for process in lives.seen.processes if 0 in (*process.users, *process.groups)] == []
        weak = [
            process
            for process in lives.seen.processes
            if process.command != "/pause"  # the cluster's own, and another user's
            and ({*process.users, *process.groups} != {65532} or process.capabilities or process.gains_rights)
        ]
        assert weak == []
        assert {process.seccomp for process in lives.seen.processes} == {2}, "filtered"


class TestSecrets:
    def test_no_secret_word_is_anywhere_but_the_planted_one_which_is_found_where_it_was_planted(
        self, lives: Lives
    ) -> None:
        found = leaks(lives.words, lives.places)
        planted = {
            "ConfigMap planted",
            f"object buckets/finetune/tests/out/{lives.namespace}/planted/manifest.json",
            "versions of configmaps",
            "log of planted",
            "audit log",
            "labels of Prometheus",
        }
        assert found == {("planted", place) for place in planted}

    def test_the_places_are_not_empty(self, lives: Lives) -> None:
        """A word that cannot be planted would be found: each place holds what was put there."""
        assert b"whole" in lives.places["log of the operator"]
        for log in ("ftj-whole-0", "ftj-whole-1", "ftj-refused-0"):
            assert any(place.startswith(f"log of {log}") and content for place, content in lives.places.items()), log
        assert b"refused" in lives.places["versions of finetunejobs"]
        assert b"Complete" in lives.places["FineTuneJob whole"]
        assert any(b"fullnameOverride" in lives.places[place] for place in lives.places if place.startswith("release"))
        files = [place for place in lives.places if place.startswith("object")]
        for part in ("adapter_model.safetensors", "report.json", "manifest.json", "checkpoints/"):
            assert [file for file in files if "/whole/" in file and part in file], part
