"""/metrics, /progress and /healthz of a real launcher, and the table that documents them."""

from __future__ import annotations

import re
import signal
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.trainer.launcher_rig import Node, Rig

from finetune_api.report import Phase

pytestmark = pytest.mark.multiprocess
DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"

SCRIPT = """
for step in range(1, 5):
    beat.update(phase=Phase.TRAINING, step=step, total_steps=40, epoch=0.1 * step, loss=2.5, validation_loss=2.75,
                learning_rate=0.001, gradient_norm=1.25, tokens_total=1000 * step, tokens_per_second=500.0,
                step_seconds=0.2 * step, model_flops_utilization=0.4, memory_bytes=100 + RANK,
                peak_memory_bytes=200 + RANK, data_wait_seconds=0.5, checkpoint_step=2, checkpoint_seconds=1.5,
                checkpoint_bytes=4096, checkpoint_uri="file:///out/checkpoints/step-00000002/")
beat.flush()
until_stopped()
end(ExitClass.INTERRUPTED)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    started = Rig(tmp_path_factory.mktemp("pages"), SCRIPT).start()
    started.wait_for_phase(Phase.TRAINING, ranks=2)
    while sum(beat.step == 4 for beat in started.progress().ranks) < 2:
        pass
    yield started
    started.signal(signal.SIGTERM)
    started.wait()


def samples(node: Node) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(node.get("/metrics"))
        for sample in family.samples
    }


def test_every_exported_name_is_documented_and_every_documented_name_is_exported(node: Node) -> None:
    rows = re.findall(r"^\| `(finetune_\w+)` \| (\w+) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    exported = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in text_string_to_metric_families(node.get("/metrics"))
    }
    assert exported == set(rows)
    assert len(rows) == len(set(rows))


def test_values_are_those_of_the_heartbeats(node: Node) -> None:
    found = samples(node)
    expected = {
        "finetune_step": 4.0,
        "finetune_total_steps": 40.0,
        "finetune_loss": 2.5,
        "finetune_validation_loss": 2.75,
        "finetune_learning_rate": 0.001,
        "finetune_gradient_norm": 1.25,
        "finetune_tokens_total": 4000.0,
        "finetune_tokens_per_second": 500.0,
        "finetune_model_flops_utilization": 0.4,
        "finetune_memory_bytes{rank=0}": 100.0,
        "finetune_memory_bytes{rank=1}": 101.0,
        "finetune_peak_memory_bytes{rank=1}": 201.0,
        "finetune_data_wait_seconds_total{rank=0}": 0.5,
        "finetune_checkpoint_seconds": 1.5,
        "finetune_checkpoint_bytes": 4096.0,
        "finetune_attempt": 1.0,
        "finetune_restarts_total": 0.0,
        "finetune_phase{phase=Training}": 1.0,
        "finetune_phase{phase=Publishing}": 0.0,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_the_step_histogram_counts_every_step_exactly(node: Node) -> None:
    found = samples(node)
    assert found["finetune_step_seconds_count"] == 4
    assert found["finetune_step_seconds_sum"] == pytest.approx(0.2 + 0.4 + 0.6 + 0.8)
    buckets = {bound: found[f"finetune_step_seconds_bucket{{le={bound}}}"] for bound in ("0.1", "0.25", "0.5", "1.0")}
    assert buckets == {"0.1": 0, "0.25": 1, "0.5": 2, "1.0": 4}


def test_no_series_carries_the_name_of_the_job(node: Node) -> None:
    labels = {
        label
        for family in text_string_to_metric_families(node.get("/metrics"))
        for sample in family.samples
        for label in sample.labels
    }
    assert labels == {"rank", "phase", "le", "version", "torch", "python"}


def test_progress_shows_all_local_ranks_and_the_plan(node: Node) -> None:
    progress = node.progress()
    assert progress.job == {"namespace": "default", "name": "job", "uid": "0" * 16}
    assert [(beat.rank, beat.local_rank, beat.step) for beat in progress.ranks] == [(0, 0, 4), (1, 1, 4)]
    assert (progress.phase, progress.attempt, progress.node_rank) == (Phase.TRAINING, 1, 0)
    assert progress.plan is not None
    assert progress.plan.world_size == 2


def test_health_and_unknown_pages(node: Node) -> None:
    assert node.get("/healthz") == "ok\n"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        node.get("/nothing")
