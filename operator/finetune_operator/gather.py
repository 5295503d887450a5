"""Every read that a look at one job needs, once: pods and warnings by LIST, progress from the launchers."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import aiohttp

from finetune_api.report import Progress
from finetune_operator.kube import CORE_EVENTS, PODS, Kube
from finetune_operator.looks import wanted
from finetune_operator.metrics import PROGRESS_PULL_FAILURES, PROGRESS_PULLS
from finetune_operator.observe import (
    JOB_LABEL,
    JobView,
    Object,
    Observed,
    PodView,
    controller_of,
    is_controlled_by_job,
    parse_progress,
    parse_time,
    pod_view,
)
from finetune_operator.settings import OperatorSettings
from finetune_operator.store import Entry

METRICS_PORT = 9464
_PULLS_AT_ONCE = 64
_MAXIMUM_PAGE_BYTES = 4 * 1024 * 1024
_COMPLAINTS = 5
_LEAVING_SECONDS = 1.0  # a pod that was asked to go is about to lose its network; its last words are not to be missed
_NODES_CLOCKS_DIFFER_BY = timedelta(seconds=30)
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
        reads = wanted(resource, job, self._kube.now(), bool(entry.pods), self._settings)
        pods = await self._pods(resource, job) if reads.pods and job is not None else None
        if pods is not None:
            entry.pods = pods
        complaints: tuple[str, ...] = ()
        if job is not None and pods is not None and _is_stuck(job, pods):
            complaints = await self._complaints(resource, job, pods)
        progress = await self._progress(resource, entry.pods) if reads.progress else ()
        return Observed(resource, self._kube.now(), job, pods, complaints, progress)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _pods(self, resource: Object, job: JobView) -> tuple[PodView, ...]:
        """Also those of a Job that somebody deleted; not those of an earlier FineTuneJob of the same name.

        Nor a pod that only wears the label: a copy that somebody debugs is no rank.
        """
        metadata = resource["metadata"]
        found = await self._kube.list(PODS, metadata["namespace"], f"{JOB_LABEL}={metadata['name']}")
        born = metadata["creationTimestamp"]
        ours = [
            pod_view(pod)
            for pod in found
            if controller_of(pod["metadata"]) == job.uid
            or (is_controlled_by_job(pod["metadata"], job.name) and pod["metadata"]["creationTimestamp"] > born)
        ]
        return tuple(sorted(ours, key=lambda pod: (pod.index, pod.created, pod.name)))

    async def _complaints(self, resource: Object, job: JobView, pods: tuple[PodView, ...]) -> tuple[str, ...]:
        """Why pods cannot be made (quota, admission) or cannot start (volumes), in the words of who knows."""
        stuck = [pod.uid for pod in pods if not pod.ended and pod.node and pod.started is None]
        since = complaints_count_since(resource, job)
        events = []
        for uid in (job.uid, *stuck[:_STUCK_PODS_ASKED]):
            selector = f"type=Warning,involvedObject.uid={uid}"
            events += await self._kube.list(CORE_EVENTS, resource["metadata"]["namespace"], field_selector=selector)
        told = sorted(((_told_at(event), event.get("message", "")) for event in events), reverse=True)
        return tuple(dict.fromkeys(message for when, message in told if when > since))[:_COMPLAINTS]

    async def _progress(self, resource: Object, pods: tuple[PodView, ...]) -> tuple[Progress, ...]:
        newest = {pod.index: pod for pod in pods}  # sorted by age
        living = [pod for pod in newest.values() if pod.address and not pod.ended]
        pages = await asyncio.gather(*(self._page(resource, pod) for pod in living))
        uid = resource["metadata"]["uid"]  # a pod of another job may have got the address meanwhile
        ours = [page for page in pages if page is not None and page.job.get("uid") == uid]
        return tuple(sorted(ours, key=lambda page: page.node_rank))

    async def _page(self, resource: Object, pod: PodView) -> Progress | None:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        PROGRESS_PULLS.inc()
        try:
            url = f"http://{host}:{METRICS_PORT}/progress"
            timeout = aiohttp.ClientTimeout(total=self._patience(pod))
            request = self._client().get(url, timeout=timeout, allow_redirects=False)  # pods send us nowhere
            async with self._pulls, request as response:
                if response.status != 200:
                    raise aiohttp.ClientPayloadError(f"status {response.status}")
                text = bytearray()
                async for part in response.content.iter_any():  # read(n) ends with the first packet
                    text += part
                    if len(text) > _MAXIMUM_PAGE_BYTES:
                        raise aiohttp.ClientPayloadError("the page is too long")
            page = parse_progress(bytes(text), resource)
        except (aiohttp.ClientError, TimeoutError, OSError):
            page = None
        if page is None:
            PROGRESS_PULL_FAILURES.inc()
        return page

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(auto_decompress=False, trust_env=False)
        return self._session

    def _patience(self, pod: PodView) -> float:
        patience = float(self._settings.progress.timeout_seconds)
        return min(patience, _LEAVING_SECONDS) if pod.asked_to_go else patience


def complaints_count_since(resource: Object, job: JobView) -> datetime:
    """Events live for an hour: what was told before the pods were asked for last is no reason to wait now."""
    attempts = resource.get("status", {}).get("attempts") or [{}]
    asked = (job.created, job.started, parse_time(attempts[-1].get("endedAt")))
    return max(when for when in asked if when is not None) - _NODES_CLOCKS_DIFFER_BY


def _told_at(event: Object) -> datetime:
    """When an Event was last repeated."""
    last = (event.get("series") or {}).get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return datetime.fromisoformat(last or event["metadata"]["creationTimestamp"])


def _is_stuck(job: JobView, pods: tuple[PodView, ...]) -> bool:
    """Whether pods are missing, or sit on a node and do not start."""
    if job.suspended:
        return False
    living = [pod for pod in pods if not pod.ended]
    missing = len({pod.index for pod in living}) < job.nodes
    return missing or any(pod.node and pod.started is None for pod in living)
