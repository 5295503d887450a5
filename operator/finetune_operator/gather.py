"""Every read that a look at one job needs, once: pods and warnings by LIST, progress from the launchers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import aiohttp
from pydantic import ValidationError

from finetune_api.report import Progress
from finetune_operator.kube import CORE_EVENTS, PODS, Kube
from finetune_operator.looks import wanted
from finetune_operator.metrics import PROGRESS_PULL_FAILURES, PROGRESS_PULLS
from finetune_operator.observe import JOB_LABEL, JobView, Object, Observed, PodView, pod_view
from finetune_operator.settings import OperatorSettings
from finetune_operator.store import Entry

METRICS_PORT = 9464
_PULLS_AT_ONCE = 64
_MAXIMUM_PAGE_BYTES = 4 * 1024 * 1024
_COMPLAINTS = 5
_STUCK_PODS_ASKED = 2  # the others of a gang wait for the same thing


class Gatherer:
    """Reads. Keeps nothing but open connections."""

    def __init__(self, kube: Kube, settings: OperatorSettings) -> None:
        self._kube = kube
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._pulls = asyncio.Semaphore(_PULLS_AT_ONCE)

    async def gather(self, entry: Entry, job: JobView | None) -> Observed:
        """What is known of the job now. Raises ApiError."""
        resource = entry.resource
        reads = wanted(resource, job, datetime.now(UTC), bool(entry.pods), self._settings)
        pods = await self._pods(resource) if reads.pods else None
        if pods is not None:
            entry.pods = pods
        complaints = await self._complaints(resource, pods) if pods is not None and _is_stuck(job, pods) else ()
        progress = await self._progress(entry.pods) if reads.progress else ()
        return Observed(resource, datetime.now(UTC), job, pods, complaints, progress)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _pods(self, resource: Object) -> tuple[PodView, ...]:
        metadata = resource["metadata"]
        found = await self._kube.list(PODS, metadata["namespace"], f"{JOB_LABEL}={metadata['name']}")
        return tuple(sorted((pod_view(pod) for pod in found), key=lambda pod: (pod.index, pod.created, pod.name)))

    async def _complaints(self, resource: Object, pods: tuple[PodView, ...]) -> tuple[str, ...]:
        """Why pods cannot be made (quota, admission) or cannot start (volumes), in the words of who knows."""
        metadata = resource["metadata"]
        stuck = [pod.name for pod in pods if not pod.ended and pod.node and pod.started is None]
        events = []
        for name in (f"ftj-{metadata['name']}", *stuck[:_STUCK_PODS_ASKED]):
            selector = f"type=Warning,involvedObject.name={name}"
            events += await self._kube.list(CORE_EVENTS, metadata["namespace"], field_selector=selector)
        events.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", reverse=True)
        return tuple(dict.fromkeys(event.get("message", "") for event in events))[:_COMPLAINTS]

    async def _progress(self, pods: tuple[PodView, ...]) -> tuple[Progress, ...]:
        newest = {pod.index: pod for pod in pods}  # sorted by age
        living = [pod for pod in newest.values() if pod.address and not pod.ended]
        pages = await asyncio.gather(*(self._page(pod) for pod in living))
        return tuple(sorted((page for page in pages if page is not None), key=lambda page: page.node_rank))

    async def _page(self, pod: PodView) -> Progress | None:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        PROGRESS_PULLS.inc()
        try:
            async with self._pulls, self._client().get(f"http://{host}:{METRICS_PORT}/progress") as response:
                response.raise_for_status()
                text = await response.content.read(_MAXIMUM_PAGE_BYTES)
            return Progress.model_validate_json(text)
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError):
            PROGRESS_PULL_FAILURES.inc()
            return None

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=self._settings.progress.timeout_seconds)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, trust_env=False)
        return self._session


def _is_stuck(job: JobView | None, pods: tuple[PodView, ...]) -> bool:
    """Whether pods are missing, or sit on a node and do not start."""
    if job is None or job.suspended:
        return False
    living = [pod for pod in pods if not pod.ended]
    missing = len({pod.index for pod in living}) < job.nodes
    return missing or any(pod.node and pod.started is None for pod in living)
