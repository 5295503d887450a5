"""Prometheus series of the operator. Documented in docs/monitoring.md."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_operator.failures import POLICIES

disable_created_metrics()  # type: ignore[no-untyped-call]  # nobody reads them, and they double the series
REGISTRY = CollectorRegistry()
_PREFIX = "finetune_operator"

RECONCILE_SECONDS = Histogram(
    f"{_PREFIX}_reconcile_duration_seconds",
    "Seconds of one reconcile.",
    registry=REGISTRY,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
RECONCILE_ERRORS = Counter(
    f"{_PREFIX}_reconcile_errors", "Reconciles that failed, by class of error.", ["class"], registry=REGISTRY
)
API_REQUESTS = Counter(
    f"{_PREFIX}_api_requests", "Requests to the API server.", ["verb", "resource", "code"], registry=REGISTRY
)
WATCH_EVENTS = Counter(f"{_PREFIX}_watch_events", "Events received by watches.", ["resource"], registry=REGISTRY)
STATUS_WRITES = Counter(f"{_PREFIX}_status_writes", "Statuses written.", registry=REGISTRY)
PROGRESS_PULLS = Counter(f"{_PREFIX}_progress_pulls", "Progress pages asked for.", registry=REGISTRY)
PROGRESS_PULL_FAILURES = Counter(
    f"{_PREFIX}_progress_pull_failures", "Progress pages that did not answer.", registry=REGISTRY
)
RESTARTS = Counter(
    f"{_PREFIX}_restarts", "Attempts that ended and were followed by another.", ["cause"], registry=REGISTRY
)
JOB_SECONDS = Histogram(
    f"{_PREFIX}_job_seconds",
    "Seconds from creation to the end of a job, by outcome.",
    ["outcome"],
    registry=REGISTRY,
    buckets=(60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 24 * 3600, 3 * 24 * 3600, 7 * 24 * 3600),
)
LEADER = Gauge(f"{_PREFIX}_leader", "1 while this replica holds the Lease (or needs none).", registry=REGISTRY)
EVERYWHERE = "*"  # no namespace can be called so
WATCHES = Gauge(
    f"{_PREFIX}_watches",
    f"1 for each namespace that this replica works on; {EVERYWHERE} is the whole cluster.",
    ["watched_namespace"],
    registry=REGISTRY,
)
BUILD_INFO = Gauge(f"{_PREFIX}_build_info", "1; the version is the label.", ["version"], registry=REGISTRY)
BUILD_INFO.labels(version=version("finetune-operator")).set(1)
for _outcome in ("Complete", "Failed"):
    JOB_SECONDS.labels(outcome=_outcome)
for _cause in POLICIES:
    RESTARTS.labels(cause=_cause)
for _error in ("ApiError", "Conflict", "InternalError", "Refused"):
    RECONCILE_ERRORS.labels(_error)


def take_lead(namespaces: Collection[str]) -> None:
    """This replica works from now on, on these namespaces; on all if none is named."""
    LEADER.set(1)
    for name in namespaces or (EVERYWHERE,):
        WATCHES.labels(name).set(1)


def give_up_lead() -> None:
    """This replica works no more."""
    LEADER.set(0)
    WATCHES.clear()


class LiveCollector(Collector):
    """Numbers read off live objects at every scrape, so that deleted jobs leave no series behind."""

    STATES = (
        "Invalid", "Pending", "Starting", "Running", "Suspending", "Suspended", "Restarting", "Publishing", "Complete",
        "Failed",
    )  # fmt: skip

    def __init__(
        self, states: Callable[[], Mapping[str, int]], queue_depth: Callable[[], int], oldest: Callable[[], float]
    ) -> None:
        self._states = states
        self._queue_depth = queue_depth
        self._oldest = oldest

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(f"{_PREFIX}_jobs", "FineTuneJobs by state.", labels=["state"])
        counted = Tally(self._states())
        for state in sorted({*self.STATES, *counted}):
            jobs.add_metric([state], counted[state])
        yield jobs
        yield GaugeMetricFamily(f"{_PREFIX}_queue_depth", "Jobs waiting to be looked at.", value=self._queue_depth())
        yield GaugeMetricFamily(
            f"{_PREFIX}_queue_oldest_seconds", "Age of the oldest unprocessed event.", value=self._oldest()
        )
