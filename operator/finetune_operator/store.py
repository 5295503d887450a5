"""What the watches have said: the newest known copy of every FineTuneJob and of its Job.

Only a mirror: it is filled again by listing after a restart, and a resync every few minutes removes what a watch
missed while it was broken (after a 410 nobody reports deletions).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.observe import JOB_LABEL, JobView, PodView, job_view
from finetune_operator.workqueue import Key

Object = Mapping[str, Any]
_UNUSED_METADATA = ("managedFields",)
_STARTING = {None, "", "Pending", "Starting"}
_RUSH_SECONDS, _RUSH_STARTS = 10.0, 20
_GONE_SECONDS = 900.0  # no listing takes so long
_FOR_GOOD = str(2**63)  # beyond every resourceVersion
_KEPT_WHEN_SETTLED = ("namespace", "name", "uid", "generation", "resourceVersion")


@dataclass(frozen=True)
class Traffic:
    """How busy the operator is."""

    live: int  # jobs that have not ended
    starting: int  # of them, jobs that have not run yet
    rush: bool = False  # many are starting one after the other just now


@dataclass
class Entry:
    """One FineTuneJob. ``planned`` and ``pods`` are caches of what can be computed or read again."""

    resource: Object
    planned: tuple[FineTuneJobSpec, Plan] | None = None
    pods: tuple[PodView, ...] = ()
    made_for: str = ""  # what ConfigMap and Service were last made sure of for
    settled: bool = False  # ended: nothing is done any more, but for its removal at ``expires``
    expires: datetime | None = None


def key_of(resource: Object) -> Key:
    return resource["metadata"]["namespace"], resource["metadata"]["name"]


class Store:
    """Mirror of FineTuneJobs and Jobs. Used from one event loop."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._jobs: dict[Key, tuple[str, JobView]] = {}  # (resourceVersion, view)
        self._live: set[Key] = set()  # not settled
        self._starting: set[Key] = set()  # of those, what has not run yet
        self._started: deque[float] = deque(maxlen=_RUSH_STARTS)  # time.monotonic() of the last jobs that came to run
        self._gone: dict[str, tuple[float, int]] = {}  # by uid, oldest first: what a listing may still show as it was

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def job_of(self, key: Key) -> JobView | None:
        """The Job of the FineTuneJob that is known by this name; not that of an earlier one, which may linger."""
        found, entry = self._jobs.get(key), self._entries.get(key)
        if found is None or (entry is not None and found[1].owner != entry.resource["metadata"]["uid"]):
            return None
        return found[1]

    def keys(self) -> list[Key]:
        return list(self._entries)

    @property
    def traffic(self) -> Traffic:
        lately = time.monotonic() - _RUSH_SECONDS
        rush = len(self._started) == _RUSH_STARTS and self._started[0] > lately
        return Traffic(len(self._live), len(self._starting), rush)

    @property
    def newest_version(self) -> int:
        """The greatest resourceVersion of any FineTuneJob here; 0 without one."""
        return max((int(entry.resource["metadata"]["resourceVersion"]) for entry in self._entries.values()), default=0)

    def states(self) -> Mapping[str, int]:
        """How many jobs are in which state."""
        return Counter(entry.resource.get("status", {}).get("state", "Pending") for entry in self._entries.values())

    def saw_resource(self, resource: Object) -> bool:
        """Remember a FineTuneJob; whether this is news (our own writes come back by the watch)."""
        key, entry = key_of(resource), self._entries.get(key_of(resource))
        if self._is_ghost(resource):
            return False
        if entry is None or entry.resource["metadata"]["uid"] != resource["metadata"]["uid"]:
            if entry is not None:  # made anew under its name
                self._bury(entry.resource["metadata"]["uid"], entry.resource["metadata"]["resourceVersion"])
            self._entries[key] = Entry(_slim(resource))
            self._count(key, resource)
            return True
        known, seen = (int(r["metadata"]["resourceVersion"]) for r in (entry.resource, resource))
        if seen <= known:  # comparable since Kubernetes 1.35 (KEP-5504), and in practice before
            return False
        if entry.resource["metadata"].get("generation") != resource["metadata"].get("generation"):
            entry.planned = None
        entry.resource, entry.settled = _slim(resource), False
        self._count(key, resource)
        return True

    def settle(self, entry: Entry, expires: datetime | None) -> None:
        """The job has ended: keep no more of it than its name and its state (there may be ten thousands)."""
        key = key_of(entry.resource)
        if self._entries.get(key) is not entry:  # deleted meanwhile, or made anew under its name
            return
        metadata = {name: entry.resource["metadata"].get(name) for name in _KEPT_WHEN_SETTLED}
        state = entry.resource.get("status", {}).get("state", "")
        self._entries[key] = Entry({"metadata": metadata, "status": {"state": state}}, settled=True, expires=expires)
        self._discount(key)

    def forget_resource(self, key: Key, uid: str) -> bool:
        """Forget a deleted FineTuneJob; false if a newer one has taken its name."""
        entry = self._entries.get(key)
        if entry is None or entry.resource["metadata"]["uid"] != uid:
            return False
        self._forget(key)
        return True

    def _forget(self, key: Key) -> None:
        metadata = self._entries.pop(key).resource["metadata"]
        self._bury(metadata["uid"], metadata["resourceVersion"])
        self._discount(key)

    def _bury(self, uid: str, version: str) -> None:
        """Remember for a while that this object is gone: a listing that was on its way must not bring it back.

        A watch also says so of an object that has lost our label. If it gets the label again, it is newer than that.
        """
        now = time.monotonic()
        while self._gone and now - (oldest := next(iter(self._gone.items())))[1][0] > _GONE_SECONDS:
            del self._gone[oldest[0]]
        self._gone[uid] = (now, int(version))

    def _is_ghost(self, item: Object) -> bool:
        metadata = item["metadata"]
        buried = self._gone.get(metadata["uid"])
        return buried is not None and int(metadata["resourceVersion"]) <= buried[1]

    def _count(self, key: Key, resource: Object) -> None:
        self._live.add(key)
        if resource.get("status", {}).get("state") in _STARTING:
            self._starting.add(key)
        elif key in self._starting:
            self._starting.remove(key)
            self._started.append(time.monotonic())

    def _discount(self, key: Key) -> None:
        self._live.discard(key)
        self._starting.discard(key)

    def saw_job(self, job: Object) -> Key | None:
        """Remember a Job of ours; the FineTuneJob that it belongs to, if a decision may depend on what is new."""
        key = _owner_key(job)
        if key is None or self._is_ghost(job):
            return None
        version = job["metadata"]["resourceVersion"]
        known = self._jobs.get(key)
        if known is not None and known[1].uid == job["metadata"]["uid"] and int(known[0]) >= int(version):
            return None
        view = job_view(job)
        self._jobs[key] = (version, view)
        return key if known is None or _essence(known[1]) != _essence(view) else None

    def forget_job(self, job: Object) -> Key | None:
        """Forget a deleted Job of ours; its FineTuneJob, unless a newer Job has taken the name."""
        key = _owner_key(job)
        metadata = job["metadata"]
        found = key is not None and self.forget_job_of(key, metadata["uid"], metadata["resourceVersion"])
        return key if found else None

    def forget_job_of(self, key: Key, uid: str, version: str = _FOR_GOOD) -> bool:
        """Forget the Job with this uid, whatever is still said of it up to ``version``; false if it was not known."""
        known = self._jobs.get(key)
        if known is None or known[1].uid != uid:
            return False
        del self._jobs[key]
        self._bury(uid, str(max(int(version), int(known[0]))))
        return True

    def uids(self, namespace: str | None = None) -> frozenset[str]:
        """Of everything mirrored now, in one namespace or in all."""
        resources = {key: entry.resource["metadata"]["uid"] for key, entry in self._entries.items()}
        jobs = {key: view.uid for key, (_, view) in self._jobs.items()}
        found = (*resources.items(), *jobs.items())
        return frozenset(uid for key, uid in found if namespace in (None, key[0]))

    def forget_lost(self, uids: frozenset[str]) -> set[Key]:
        """Forget what is no longer there, as a complete listing shows; the keys that this changes."""
        gone = {key for key, entry in self._entries.items() if entry.resource["metadata"]["uid"] in uids}
        orphaned = {key for key, (_, view) in self._jobs.items() if view.uid in uids}
        for key in gone:
            self._forget(key)
        for key in orphaned:
            version, view = self._jobs.pop(key)
            self._bury(view.uid, version)
        return gone | orphaned


def _slim(resource: Object) -> Object:
    metadata = {name: value for name, value in resource["metadata"].items() if name not in _UNUSED_METADATA}
    return {**resource, "metadata": metadata}


def _essence(view: JobView) -> JobView:
    """Without the counts that move while pods start: what matters then is that all are ready."""
    active = view.active if view.suspended else 0
    return replace(view, active=active, ready=int(view.ready + view.succeeded >= view.nodes), started=None)


def _owner_key(job: Object) -> Key | None:
    metadata = job["metadata"]
    name = metadata.get("labels", {}).get(JOB_LABEL)
    return (metadata["namespace"], name) if name else None
