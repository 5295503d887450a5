"""Prometheus series of one launcher, read from its ranks' heartbeats at every scrape. Documented in docs/metrics.md.

Rank numbers are the only labels of a series; the job's name is added by the PodMonitor. Series of the whole job (loss,
tokens, step) are exported by the launcher that has rank 0.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_api.report import STEP_SECONDS_BUCKETS, Heartbeat, Phase, Progress
from finetune_trainer.status import LauncherStatus


@dataclass(frozen=True)
class Series:
    """One exported name: where its value stands in a heartbeat (``None``: not known yet, not exported)."""

    name: str
    help: str
    value: Callable[[Heartbeat], float | None]
    counter: bool = False
    per_rank: bool = False

    def family(self, heartbeats: Iterable[Heartbeat]) -> Metric:
        kind = CounterMetricFamily if self.counter else GaugeMetricFamily
        family: GaugeMetricFamily | CounterMetricFamily = kind(
            self.name, self.help, labels=("rank",) if self.per_rank else ()
        )
        for heartbeat in heartbeats:
            value = self.value(heartbeat)
            if value is not None and (self.per_rank or heartbeat.rank == 0):
                family.add_metric([str(heartbeat.rank)] if self.per_rank else [], float(value))
        return family


SERIES: tuple[Series, ...] = (
    Series("finetune_step", "Optimizer steps done.", lambda beat: beat.step),
    Series("finetune_total_steps", "Optimizer steps of the whole job.", lambda beat: beat.total_steps or None),
    Series("finetune_epoch", "Epochs done, with fraction.", lambda beat: beat.epoch),
    Series("finetune_loss", "Training loss of the latest step, mean over tokens.", lambda beat: beat.loss),
    Series(
        "finetune_validation_loss", "Validation loss of the latest evaluation.", lambda beat: beat.validation_loss
    ),
    Series("finetune_learning_rate", "Learning rate of the latest step.", lambda beat: beat.learning_rate),
    Series("finetune_gradient_norm", "Gradient norm before clipping.", lambda beat: beat.gradient_norm),
    Series("finetune_tokens", "Tokens trained since step 0.", lambda beat: beat.tokens_total, counter=True),
    Series(
        "finetune_tokens_per_second", "Tokens per second of the whole job, latest steps.",
        lambda beat: beat.tokens_per_second,
    ),
    Series(
        "finetune_model_flops_utilization", "Model FLOPs over the devices' peak, 0 to 1.",
        lambda beat: beat.model_flops_utilization,
    ),
    Series("finetune_checkpoint_step", "Step of the newest checkpoint.", lambda beat: beat.checkpoint_step),
    Series("finetune_checkpoint_seconds", "Seconds the newest checkpoint took.", lambda beat: beat.checkpoint_seconds),
    Series("finetune_checkpoint_bytes", "Size of the newest checkpoint.", lambda beat: beat.checkpoint_bytes),
    Series(
        "finetune_data_wait_seconds", "Seconds a rank has waited for data.", lambda beat: beat.data_wait_seconds,
        counter=True, per_rank=True,
    ),
    Series(
        "finetune_memory_bytes", "Memory in use: allocated on the device, or resident on CPU.",
        lambda beat: beat.memory_bytes, per_rank=True,
    ),
    Series("finetune_peak_memory_bytes", "Most memory used yet.", lambda beat: beat.peak_memory_bytes, per_rank=True),
    Series(
        "finetune_rank_step", "Step of each rank; a straggler stays behind.", lambda beat: beat.step, per_rank=True
    ),
    Series(
        "finetune_rank_heartbeat_timestamp_seconds", "Unix time of each rank's latest word.",
        lambda beat: beat.updated_at, per_rank=True,
    ),
)  # fmt: skip


class TrainerCollector(Collector):
    """Everything a scrape returns; nothing is kept between scrapes."""

    def __init__(self, status: LauncherStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        progress = self._status.progress()
        yield from (series.family(progress.ranks) for series in SERIES)
        yield _step_seconds(progress.ranks)
        yield from _launcher(progress)
        yield _build_info()


def _step_seconds(heartbeats: Iterable[Heartbeat]) -> Metric:
    """Exact: rank 0 counts every one of its steps into the buckets, the heartbeat carries the counts."""
    family = HistogramMetricFamily("finetune_step_seconds", "Seconds per optimizer step.")
    for beat in heartbeats:
        if beat.rank != 0 or not beat.step_seconds_counts:
            continue
        seen, buckets = 0, []
        for bound, count in zip((*STEP_SECONDS_BUCKETS, "+Inf"), beat.step_seconds_counts, strict=True):
            seen += count
            buckets.append((str(bound), seen))
        family.add_metric([], buckets, beat.step_seconds_sum)
    return family


def _launcher(progress: Progress) -> Iterator[Metric]:
    phase = GaugeMetricFamily("finetune_phase", "1 for the phase this node is in, 0 for the others.", labels=["phase"])
    for known in Phase:
        phase.add_metric([known.value], float(known == progress.phase))
    yield phase
    yield GaugeMetricFamily("finetune_attempt", "Starts of the ranks by this launcher.", value=progress.attempt)
    yield CounterMetricFamily("finetune_restarts", "Restarts after a failure.", value=progress.restarts)
    yield GaugeMetricFamily("finetune_stopping", "1 while ranks write a last checkpoint.", value=progress.stopping)
    yield GaugeMetricFamily(
        "finetune_start_timestamp_seconds", "Unix time of the launcher's start.", value=progress.started_at
    )


def _build_info() -> Metric:
    labels = {
        "version": version("finetune-operator"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    family = GaugeMetricFamily("finetune_build_info", "1; versions are the labels.", labels=list(labels))
    family.add_metric(list(labels.values()), 1.0)
    return family
