"""Filling the mirror by LIST: before the watches begin, and now and then for what a broken watch has missed."""

from __future__ import annotations

from collections.abc import Collection

from finetune_operator.handlers import MANAGED
from finetune_operator.kube import FINETUNEJOBS, JOBS, ApiError, Kube
from finetune_operator.store import Store, key_of
from finetune_operator.workqueue import Key

_SELECTOR = ",".join(f"{name}={value}" for name, value in MANAGED.items())


class Restored(Exception):
    """etcd was restored from a backup: the cluster's time went back."""


async def unreadable(kube: Kube, scopes: Collection[str | None]) -> dict[str | None, ApiError]:
    """Where FineTuneJobs and Jobs may not be listed: the namespace is gone, or its Role is missing.

    ``scopes``: namespaces, or None for the whole cluster. Raises ApiError for everything else, with status 404 while
    the CRD is not installed (an absent namespace has no objects, but it exists for LIST).
    """
    found = {}
    for scope in scopes:
        try:
            for kind in (FINETUNEJOBS, JOBS):
                await kube.peek(kind, scope)
        except ApiError as error:
            if error.status != 403:
                raise
            found[scope] = error
    return found


async def list_jobs(kube: Kube, store: Store, namespaces: Collection[str]) -> set[Key]:
    """Mirror every Job of ours (no ``namespaces``: in the whole cluster); what changed. Raises ApiError."""
    changed = set()
    for scope in namespaces or (None,):
        async for job in kube.each(JOBS, scope, _SELECTOR):
            if key := store.saw_job(job):
                changed.add(key)
    return changed


async def list_everything(kube: Kube, store: Store, scope: str | None) -> set[Key]:
    """Mirror FineTuneJobs and Jobs of a namespace (None: of the cluster), and forget those that are gone; what changed.

    What the watches report meanwhile is kept: only what was known before can be missing. Raises ApiError, or Restored:
    all that the mirror would take for old from then on is news.
    """
    known = store.newest_version
    if int(now := await kube.peek(FINETUNEJOBS, scope)) < known:
        raise Restored(f"the API server is at resourceVersion {now}, and was at {known} before")
    before = store.uids(scope)
    there: set[str] = set()
    changed: set[Key] = set()
    async for resource in kube.each(FINETUNEJOBS, scope):
        there.add(resource["metadata"]["uid"])
        if store.saw_resource(resource):
            changed.add(key_of(resource))
    async for job in kube.each(JOBS, scope, _SELECTOR):
        there.add(job["metadata"]["uid"])
        if key := store.saw_job(job):
            changed.add(key)
    return changed | store.forget_lost(before - there)
