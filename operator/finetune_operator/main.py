"""The process: lease, watches, workers, pages; and how all of them stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

import kopf

from finetune_api import API_GROUP
from finetune_api.errors import SpecError
from finetune_operator.gather import Gatherer
from finetune_operator.handlers import build_registry, build_settings
from finetune_operator.kube import ApiError, Kube
from finetune_operator.lease import Lease, LeaseLost
from finetune_operator.listing import Restored, list_everything, list_jobs, unreadable
from finetune_operator.logs import set_up
from finetune_operator.metrics import RECONCILE_ERRORS, REGISTRY, LiveCollector, give_up_lead, take_lead
from finetune_operator.pages import Pages
from finetune_operator.reconcile import ChildRefused, Reconciler
from finetune_operator.settings import OperatorSettings, read_settings
from finetune_operator.store import Store
from finetune_operator.workqueue import Key, WorkQueue

log = logging.getLogger("finetune_operator")

RESYNC_SECONDS = 300.0
_STOP_SECONDS = 5.0
_CANCEL_AGAIN_SECONDS = 1.0
_LIST_AGAIN_SECONDS = 1.0
_NAMESPACE_SECONDS = 15.0
_NO_CRD = "the CRD finetunejobs.finetune.dev is not installed; install it: kubectl apply --server-side -f crds/"


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel until they have ended.

    A library may lose a cancellation on its way (``asyncio.wait_for`` of Python 3.11 does if what it waits for comes
    at the same moment), and whoever loops would go on for ever.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_SECONDS)
    for task in tasks:
        _error(task)  # known to whoever asks the task; not told as lost


class NamespaceAppeared(Exception):
    """A namespace of the settings that could not be read at the start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or a new namespace (0), a lost lease or a restored etcd (1), or bad settings (2)."""
    parser = argparse.ArgumentParser(prog="python -m finetune_operator", description="Operator for FineTuneJobs.")
    parser.add_argument("--config", type=Path, required=True, help="settings as JSON (docs/helm-values.md)")
    options = parser.parse_args(arguments)
    try:
        settings = read_settings(options.config)
    except SpecError as error:
        print(error, file=sys.stderr)
        return 2
    set_up(settings.log)
    return asyncio.run(Operator(settings).run())


class Operator:
    """One replica."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._store = Store()
        self._queue = WorkQueue()
        self._stop = asyncio.Event()
        self._watching = asyncio.Event()
        self._standing_by = True
        self._served = list(settings.namespaces)  # of those, what may be read
        self._why = "the watches are not running yet"

    async def run(self) -> int:
        """Stand by, work, stop; the exit code."""
        self._catch_signals()
        REGISTRY.register(
            LiveCollector(self._store.states, lambda: self._queue.depth, lambda: self._queue.oldest_seconds)
        )
        pages = Pages(self._trouble)
        await pages.serve(self._settings.metrics.port, self._settings.health.port)
        kube = await Kube.connect()
        unhindered = await Kube.connect(connections=1)  # a renewal must not wait behind requests that hang
        gc.freeze()  # modules stay: to search them for garbage would stop everything for 0.2 s amid a rush of jobs
        lease = Lease(unhindered, self._settings.lease) if self._settings.lease.enabled else None
        try:
            if lease is not None and not await self._unless_stopped(lease.acquire()):
                return 0
            self._standing_by = False
            take_lead(self._settings.namespaces)
            await self._work(kube, lease)
            return 0
        except NamespaceAppeared as error:
            log.info("namespace %s can be read now: starting again, to serve it", error)
            return 0
        except LeaseLost as error:
            log.error("%s: stopping, so that two operators never work at once", error)
            return 1
        except Restored as error:
            log.error("%s: etcd was restored; starting again, because all that was known is void", error)
            return 1
        finally:
            give_up_lead()
            await pages.close()
            await kube.close()
            await unhindered.close()

    async def _work(self, kube: Kube, lease: Lease | None) -> None:
        """Watch and reconcile until asked to stop; then let go of the lease before anything slow."""
        gatherer = Gatherer(kube, self._settings)
        reconciler = Reconciler(kube, self._store, gatherer, self._settings)
        kopf_stop = asyncio.Event()
        watches = asyncio.create_task(self._watch(kube, kopf_stop))
        signals = asyncio.create_task(self._own_signals())
        tasks = [asyncio.create_task(self._worker(reconciler)) for _ in range(self._settings.concurrency)]
        tasks += [asyncio.create_task(work) for work in (self._resync(kube), self._await_namespaces(kube))]
        if lease is not None:
            tasks.append(asyncio.create_task(lease.keep()))
        stopping = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait({watches, stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        await end({*tasks, stopping, signals})
        if lease is not None and not any(isinstance(_error(task), LeaseLost) for task in done):
            await lease.release()
        kopf_stop.set()
        await asyncio.wait({watches}, timeout=_STOP_SECONDS)
        await gatherer.close()
        for task in done:
            task.result()  # a lost lease or a defect ends the process: crash-only

    async def _own_signals(self) -> None:
        """kopf takes the signals over when it starts; take them back, to stop in our order."""
        await self._watching.wait()
        self._catch_signals()

    async def _watch(self, kube: Kube, stop: asyncio.Event) -> None:
        """First all Jobs, so that no job is taken for new after a restart (an index of kopf's holds back as well, but
        wakes everybody who waits at every object: 12 s for a thousand jobs); then whatever happens."""
        while not await self._begin(kube):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LIST_AGAIN_SECONDS):
                    await stop.wait()
                return
        await kopf.operator(
            registry=build_registry(self._store, self._queue),
            settings=build_settings(API_GROUP),
            standalone=True,
            clusterwide=not self._served,
            namespaces=self._served,
            stop_flag=stop,
            ready_flag=self._watching,
        )

    async def _begin(self, kube: Kube) -> bool:
        """Whether there is something to watch: kopf would never ask again for a kind or a namespace that is missing."""
        namespaces = self._settings.namespaces
        try:
            refused = await unreadable(kube, namespaces or (None,))
            self._served = [name for name in namespaces if name not in refused]
            if refused and not self._served:
                raise next(iter(refused.values()))
            await list_jobs(kube, self._store, self._served)
        except ApiError as error:
            trouble = _NO_CRD if error.status == 404 else f"Jobs cannot be listed: {error}"
            if trouble != self._why:
                log.warning("%s", trouble)
            self._why = trouble
            return False
        for refusal in refused.values():
            log.warning("%s; the other namespaces are served", refusal)
        return True

    async def _await_namespaces(self, kube: Kube) -> None:
        """Raises NamespaceAppeared when one that was left out can be read: the process starts anew and serves it."""
        await self._watching.wait()
        while missing := [name for name in self._settings.namespaces if name not in self._served]:
            await asyncio.sleep(_NAMESPACE_SECONDS)
            with contextlib.suppress(ApiError):
                refused = await unreadable(kube, missing)
                if appeared := [name for name in missing if name not in refused]:
                    raise NamespaceAppeared(appeared[0])
        await asyncio.Event().wait()  # for ever: nothing is missing

    async def _worker(self, reconciler: Reconciler) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self._reconcile(reconciler, key)
            finally:
                self._queue.done(key)

    async def _reconcile(self, reconciler: Reconciler, key: Key) -> None:
        """One look; trouble with the API server is tried again later, a defect is told and tried again later."""
        entry = self._store.get(key)
        about = {"namespace": key[0], "job": key[1], "uid": entry.resource["metadata"]["uid"] if entry else ""}
        try:
            look_again = await reconciler.reconcile(key)
        except ChildRefused as refused:
            RECONCILE_ERRORS.labels("Refused").inc()
            delay = self._queue.failed(key, refused.error.retry_after_seconds or 0.0)
            log.warning("%s (trying again in %.1f s)", refused, delay, extra=about)
        except ApiError as error:
            conflict = error.status == 409
            RECONCILE_ERRORS.labels("Conflict" if conflict else "ApiError").inc()
            delay = self._queue.failed(key, error.retry_after_seconds or 0.0)
            level = logging.DEBUG if conflict or error.status == 404 else logging.WARNING
            log.log(level, "%s (looking again in %.1f s)", error, delay, extra=about)
        except Exception:
            RECONCILE_ERRORS.labels("InternalError").inc()
            log.exception("defect (looking again in %.1f s)", self._queue.failed(key), extra=about)
        else:
            self._queue.succeeded(key)
            if look_again is not None:
                self._queue.add(key, look_again)

    async def _resync(self, kube: Kube) -> None:
        """List everything now and then: what a broken watch missed comes to light."""
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            for scope in self._served or (None,):
                try:
                    changed = await list_everything(kube, self._store, scope)
                except ApiError as error:  # one namespace that lost its Role stops no other
                    log.warning("resync of %s: %s", scope or "the cluster", error)
                    continue
                for key in changed:
                    self._queue.add(key)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Whether ``work`` was done before a signal came."""
        task, stopping = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        done, pending = await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await end(pending)
        if task in done:
            task.result()
        return task in done

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)

    def _trouble(self) -> str:
        """Why this replica is not ready, or nothing. A replica that stands by is ready."""
        return "" if self._standing_by or self._watching.is_set() else self._why


def _error(task: asyncio.Task[Any]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
