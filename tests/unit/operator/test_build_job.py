"""The Indexed Job and its Service."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.build_shapes import SHAPES, children, smallest

from finetune_api.exits import Cause, ExitClass
from finetune_operator.build import Children, pods_digest
from finetune_operator.observe import PODS_DIGEST, PODS_GENERATION


def test_a_job_has_one_indexed_pod_per_node_and_never_gives_up_by_itself() -> None:
    spec = dict(children(smallest(distributed={"nodes": 4})).job["spec"])
    del spec["template"], spec["podFailurePolicy"]
    assert spec == {
        "completionMode": "Indexed",
        "completions": 4,
        "parallelism": 4,
        "backoffLimitPerIndex": 2147483647,
        "podReplacementPolicy": "Failed",
        "suspend": False,
    }


def test_the_run_policy_is_the_jobs_except_that_the_operator_removes_what_has_ended() -> None:
    built, _ = _built("suspended, with a deadline")
    assert (built.job["spec"]["suspend"], built.job["spec"]["activeDeadlineSeconds"]) == (True, 60)
    assert "ttlSecondsAfterFinished" not in built.job["spec"]


def test_a_disruption_is_ignored_and_every_error_of_the_user_ends_the_job() -> None:
    ignore, fail = children(smallest()).job["spec"]["podFailurePolicy"]["rules"]
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert fail["action"] == "FailJob"
    codes = fail["onExitCodes"]["values"]
    assert {ExitClass.from_code(code) for code in codes} == {e for e in ExitClass if e.cause is Cause.USER}
    assert codes == sorted(set(codes))  # the API server insists
    assert 0 not in codes
    assert {ExitClass.INTERRUPTED.code, ExitClass.RANK_KILLED.code, 137}.isdisjoint(codes)
    assert (fail["onExitCodes"]["containerName"], fail["onExitCodes"]["operator"]) == ("trainer", "In")


def test_only_our_labels_and_annotations_reach_the_job() -> None:
    built = children(
        smallest(),
        labels={
            "finetune.dev/team": "a",
            "kueue.x-k8s.io/queue-name": "team-a",
            "app.kubernetes.io/name": "mine",
            "team": "ml",
        },
        annotations={
            "finetune.dev/note": "x",
            "kueue.x-k8s.io/y": "z",
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
        },
    )
    metadata = built.job["metadata"]
    assert metadata["labels"] == {
        "app.kubernetes.io/name": "finetune-job",
        "app.kubernetes.io/managed-by": "finetune-operator",
        "finetune.dev/job": "job",
        "finetune.dev/team": "a",
    }
    assert metadata["annotations"].keys() == {"finetune.dev/note", PODS_DIGEST, PODS_GENERATION}
    assert metadata["annotations"]["finetune.dev/note"] == "x"
    assert "annotations" not in built.config_map["metadata"]


def test_a_label_of_the_user_cannot_pretend_to_be_another_job() -> None:
    built = children(smallest(), labels={"finetune.dev/job": "other"})
    assert built.job["metadata"]["labels"]["finetune.dev/job"] == "job"


def test_the_service_names_pods_before_they_are_ready() -> None:
    assert children(smallest()).service["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"app.kubernetes.io/name": "finetune-job", "finetune.dev/job": "job"},
        "ports": [
            {"name": "rendezvous", "port": 29400, "targetPort": "rendezvous", "protocol": "TCP"},
            {"name": "metrics", "port": 9464, "targetPort": "metrics", "protocol": "TCP"},
        ],
    }


@pytest.mark.parametrize(
    ("grace", "ranks"), [(120, 110), (60, 50), (30, 24), (10, 8), (5, 4), (2, 1), (1, 1), (3600, 3590)]
)
def test_the_launcher_keeps_a_part_of_the_grace_period_for_its_last_word(grace: int, ranks: int) -> None:
    from finetune_operator.build.config_map import ranks_grace_seconds

    assert ranks_grace_seconds(grace) == ranks


def _built(shape: str) -> tuple[Children, Any]:
    spec, settings = SHAPES[shape]
    return children(spec, settings), settings


def test_a_job_says_which_blocks_of_the_spec_its_pods_were_made_from() -> None:
    spec = smallest()
    digest = children(spec).job["metadata"]["annotations"][PODS_DIGEST]
    assert digest == pods_digest(spec)
    assert pods_digest({**spec, "runPolicy": {"suspend": True}}) == digest
    for block in ("resources", "placement", "checkpoint"):
        assert pods_digest({**spec, block: {}}) != digest, block
