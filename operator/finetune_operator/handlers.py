"""Table of contents: what the operator watches, and what each event means. All decisions are made in reconcile.py."""

from __future__ import annotations

from typing import Any

import kopf

from finetune_operator.kube import CONNECT_SECONDS, FINETUNEJOBS, JOBS, PAGE, REQUEST_SECONDS
from finetune_operator.looks import is_calm, seconds_after_listing
from finetune_operator.metrics import WATCH_EVENTS
from finetune_operator.store import Store, key_of
from finetune_operator.workqueue import WorkQueue

MANAGED = {"app.kubernetes.io/managed-by": "finetune-operator"}


def build_registry(store: Store, queue: WorkQueue) -> kopf.OperatorRegistry:
    """The handlers of this operator. None of them makes kopf write: no annotations, no finalizers."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**keywords: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**keywords) or kopf.login_with_kubeconfig(**keywords)

    @kopf.on.event(JOBS.group, JOBS.version, JOBS.plural, registry=registry, labels=MANAGED)
    async def job_changed(event: kopf.RawEvent, **_: Any) -> None:  # async: kopf runs plain functions in threads
        WATCH_EVENTS.labels(resource=JOBS.plural).inc()
        deleted = event["type"] == "DELETED"
        if key := (store.forget_job if deleted else store.saw_job)(event["object"]):
            queue.add(key)

    @kopf.on.event(FINETUNEJOBS.group, FINETUNEJOBS.version, FINETUNEJOBS.plural, registry=registry)
    async def finetunejob_changed(event: kopf.RawEvent, **_: Any) -> None:
        WATCH_EVENTS.labels(resource=FINETUNEJOBS.plural).inc()
        resource = event["object"]
        key = key_of(resource)
        if event["type"] == "DELETED":
            if store.forget_resource(key, resource["metadata"]["uid"]):
                queue.forget(key)
        elif store.saw_resource(resource):
            job = store.job_of(key)
            if event["type"] is None and is_calm(resource, job):  # listed after a start: no hurry, and not all at once
                queue.add(key, seconds_after_listing(store.traffic))
            else:
                queue.add(key, first=job is None)  # pods before words: no job waits for the statuses of others

    return registry


def build_settings(scope: str) -> kopf.OperatorSettings:
    """kopf as a watcher only. ``scope`` is this operator's annotation prefix, should kopf ever need one."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.scanning.disabled = True  # CRD and namespaces are known: no cluster-wide reads of those
    settings.persistence.finalizer = f"{scope}/unused"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=scope)
    settings.persistence.diffbase_storage = _NoDifferences()
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 660
    settings.watching.connect_timeout = settings.networking.connect_timeout = CONNECT_SECONDS
    settings.networking.request_timeout = REQUEST_SECONDS  # by itself kopf waits five minutes for a page of a list
    settings.watching.chunk_size = PAGE  # by itself kopf holds every object there is at once
    settings.watching.label_selectors[f"{JOBS.plural}.{JOBS.version}.{JOBS.group}"] = ",".join(
        f"{name}={value}" for name, value in MANAGED.items()
    )
    settings.queueing.idle_timeout = 1.0
    settings.queueing.exit_timeout = 1.0
    return settings


class _NoDifferences(kopf.DiffBaseStorage):
    """kopf compares nothing for us, and need not copy every object to do so."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:  # noqa: ARG002
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:  # noqa: ARG002
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is kept."""
