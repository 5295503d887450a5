"""One look at one job: from what the watches said to at most one status write. Looking twice changes nothing.

observed = gather()  ->  spec = parse_spec()  ->  plan = make_plan()  ->  children = build_children()  ->  apply
         ->  verdict = derive()  ->  commands  ->  status, once, if it changed  ->  events
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.errors import SpecError
from finetune_api.plan import Facts, Plan
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity
from finetune_api.validation import Place, parse_spec
from finetune_operator.build import build_children, pods_digest
from finetune_operator.checks import WAITING_LOOK_SECONDS
from finetune_operator.derive import (
    changes,
    derive,
    derive_ended,
    derive_invalid,
    derive_refused,
    dump,
    has_ended,
    is_refused,
    is_settled,
    seconds_to_live,
)
from finetune_operator.events import tell
from finetune_operator.failures import Budget, policy
from finetune_operator.gather import Gatherer
from finetune_operator.kube import (
    CONFIG_MAPS,
    FIELD_MANAGER,
    FINETUNEJOBS,
    JOBS,
    PODS,
    PROGRESS_MANAGER,
    SERVICES,
    ApiError,
    Kube,
)
from finetune_operator.logs import log_of
from finetune_operator.looks import is_over, seconds_too_early, seconds_until_next_look
from finetune_operator.metrics import JOB_SECONDS, RECONCILE_SECONDS, RESTARTS, STATUS_WRITES
from finetune_operator.observe import JobView, Observed
from finetune_operator.policy import policy_problems
from finetune_operator.sentences import as_sentence
from finetune_operator.settings import OperatorSettings
from finetune_operator.situation import run_policy
from finetune_operator.store import Entry, Store
from finetune_operator.verdict import DeletePod, DeleteResource, Verdict
from finetune_operator.workqueue import Key

MANAGER = "finetune-operator"  # of a job whose spec.managedBy is absent
_PROGRESS_FIELDS = frozenset({"progress", "message"})
_REFUSED = frozenset({400, 403, 404, 422})  # the same request will be refused until somebody changes something
_GARBAGE_SECONDS = 10.0  # that the children of a deleted job may take to go


class ChildRefused(Exception):
    """The API server does not take a child: quota, admission, another object of that name."""

    def __init__(self, error: ApiError, sentence: str) -> None:
        super().__init__(sentence)
        self.error = error
        self.sentence = sentence


@dataclass
class Reconciler:
    """Brings the cluster and the status of one job to what its spec asks for."""

    kube: Kube
    store: Store
    gatherer: Gatherer
    settings: OperatorSettings

    async def reconcile(self, key: Key) -> float | None:
        """Look at one job; the seconds until it wants to be looked at again. Raises ApiError and ChildRefused."""
        started = time.monotonic()
        try:
            return await self._look(key)
        finally:
            RECONCILE_SECONDS.observe(time.monotonic() - started)

    async def _look(self, key: Key) -> float | None:
        entry = self.store.get(key)
        if entry is None or "deletionTimestamp" in entry.resource["metadata"]:
            return None  # gone or going: owner references take the children along
        if entry.settled:
            return await self._expire(entry)
        if entry.resource["spec"].get("managedBy", MANAGER) != MANAGER:
            return None
        look_again = None
        job = self.store.job_of(key)
        if early := seconds_too_early(entry.resource, job, self.kube.now(), self.store.traffic):
            return early
        if not is_settled(entry.resource, job) or is_refused(entry.resource):
            observed = await self.gatherer.gather(entry, job)
            try:
                verdict = await self._judge(key, entry, observed)
            except ChildRefused as refused:
                await self._write(observed.resource, derive_refused(observed, refused.sentence))
                raise
            await self._write(observed.resource, verdict)
            await self._obey(key, entry, verdict)
            look_again = seconds_until_next_look(verdict.status.state, verdict.look_again_seconds, self.store.traffic)
            job = self.store.job_of(key)
            if job is not None and is_to_be_made_anew(entry.resource, job):
                look_again = 0.0
        return await self._settle(key, entry) if is_settled(entry.resource, job) else look_again

    async def _judge(self, key: Key, entry: Entry, observed: Observed) -> Verdict:
        """Parse and plan (once per generation), make sure of the children, derive the status.

        All from what was gathered: news that come meanwhile belong to the next look, and make this one's status a 409.
        """
        if has_ended(observed.resource):
            return derive_ended(observed)
        try:
            observed = await self._drop_outdated(key, observed)
            planned = entry.planned
            if planned is None or observed.job is None:  # whatever is made now follows the rules of now
                planned = plan_of(observed.resource, self.settings, is_new=observed.job is None)
            if entry.resource is observed.resource:
                entry.planned = planned
            observed = await self._ensure_children(key, entry, planned, observed)
        except SpecError as error:
            if observed.job is None:
                return derive_invalid(observed, error.problems)
            observed = await self._follow_run_policy(key, observed.job, observed)
            return derive(observed, None, self.settings, error.problems)
        return derive(observed, planned[1], self.settings)

    async def _drop_outdated(self, key: Key, observed: Observed) -> Observed:
        """A Job whose pods were made from blocks that have changed since is made anew, once the job says Suspended.

        No pod is left then, and what the last ones said stands in the status.

        The API server lets those blocks change while the job is suspended only (CEL); if a resume has followed before
        we looked, the pods are stopped first. Raises SpecError before anything is deleted.
        """
        job = observed.job
        if job is None or not is_to_be_made_anew(observed.resource, job):
            return observed
        planned = plan_of(observed.resource, self.settings, is_new=True)
        build_children(observed.resource, *planned, self.settings)
        log_of(observed.resource).info("making the Job %s anew: its spec has changed while it was suspended", job.name)
        await self.kube.delete(JOBS, key[0], job.name, job.uid)
        self.store.forget_job_of(key, job.uid)
        return _with_job(observed, None)

    async def _ensure_children(
        self, key: Key, entry: Entry, planned: tuple[FineTuneJobSpec, Plan], observed: Observed
    ) -> Observed:
        """Create what is missing. A Job that exists is never built anew: an upgrade must not restart pods."""
        spec, plan = planned
        job = observed.job
        if job is None:
            children = build_children(observed.resource, spec, plan, self.settings)
            for manifest in children.manifests:
                made = await self._make(manifest, observed)
            self.store.saw_job(made)
            return _with_job(observed, self.store.job_of(key))
        if job.deleting:
            return observed
        await self._make_again(entry, observed.resource, planned, job)
        return await self._follow_run_policy(key, job, observed)

    async def _follow_run_policy(self, key: Key, job: JobView, observed: Observed) -> Observed:
        """Of a Job that exists only this changes."""
        asked = run_policy(observed.resource)
        suspend = bool(asked.get("suspend")) or is_outdated(observed.resource, job)
        wanted = {"suspend": suspend, "activeDeadlineSeconds": asked.get("activeDeadlineSeconds")}
        current = (job.suspended, job.active_deadline_seconds)
        if current == tuple(wanted.values()) or job.deleting or job.complete or job.failure:
            return observed
        await self._change_job(key, job, wanted)
        return _with_job(observed, self.store.job_of(key))

    async def _make(self, manifest: Mapping[str, Any], observed: Observed) -> Mapping[str, Any]:
        """Create or apply one child. Raises ChildRefused where it is the child that the API server does not take."""
        try:
            return await self.kube.ensure(manifest)
        except ApiError as error:
            if error.status not in _REFUSED or _waits_for_an_earlier_job(error, observed):
                raise
            what = f"{manifest['kind']} {manifest['metadata']['name']}"
            raise ChildRefused(error, f"the API server refuses the {what}: {as_sentence(str(error))}") from error

    async def _make_again(
        self, entry: Entry, resource: Mapping[str, Any], planned: tuple[FineTuneJobSpec, Plan], job: JobView
    ) -> None:
        """Before pods start anew: the ConfigMap and the Service that they need, should somebody have deleted them."""
        beginning = pods_begin_anew(resource, job)
        if beginning is None or beginning == entry.made_for:
            return
        children = build_children(resource, *planned, self.settings, config_map_name=job.config_map)
        for kind, manifest in ((CONFIG_MAPS, children.config_map), (SERVICES, children.service)):
            try:
                await self.kube.create(kind, manifest)
                log_of(resource).warning("made %s %s again", manifest["kind"], manifest["metadata"]["name"])
            except ApiError as error:
                if error.status != 409:  # it is there
                    raise
        entry.made_for = beginning

    async def _change_job(self, key: Key, job: JobView, spec: Mapping[str, Any]) -> None:
        current = await self.kube.get(JOBS, key[0], job.name)
        if current["metadata"]["uid"] == job.uid:
            self.store.saw_job(await self.kube.merge(JOBS, current, {"spec": dict(spec)}))

    async def _write(self, resource: Mapping[str, Any], verdict: Verdict) -> None:
        """One merge patch with what changed, refused if the job has changed meanwhile; then the events."""
        before = resource.get("status", {})
        after = dump(verdict.status)
        changed = changes(before, after)
        if changed and not _is_early(before, verdict) and not _is_only_a_date(before, after, changed):
            manager = PROGRESS_MANAGER if changed.keys() <= _PROGRESS_FIELDS else FIELD_MANAGER
            written = await self.kube.merge(FINETUNEJOBS, resource, {"status": changed}, "status", manager)
            STATUS_WRITES.inc()
            if after.get("state") != before.get("state"):
                log_of(resource).info("%s: %s", after.get("state"), after.get("message"))
            self.store.saw_resource(written)
            _count(resource, before, after)
        await tell(self.kube, resource, verdict.events)

    async def _obey(self, key: Key, entry: Entry, verdict: Verdict) -> None:
        """Carry out the verdict's commands. After the status, so that a crash between repeats only what is harmless."""
        for command in verdict.commands:
            log_of(entry.resource).info("%s", command)
            if isinstance(command, DeletePod) and command.force:
                await self.kube.give_up_pod(key[0], command.name, command.uid)
            elif isinstance(command, DeletePod):
                await self.kube.delete(PODS, key[0], command.name, command.uid)
            elif isinstance(command, DeleteResource):
                await self._delete(entry.resource)
            else:
                await self._stop_job(key)

    async def _stop_job(self, key: Key) -> None:
        job = self.store.job_of(key)
        if job is not None and not is_over(job):
            await self._change_job(key, job, {"suspend": True})

    async def _settle(self, key: Key, entry: Entry) -> float | None:
        """The job has ended: nothing of it may still run; forget all but its name."""
        now = self.kube.now()
        await self._stop_job(key)
        left = seconds_to_live(entry.resource, now)
        self.store.settle(entry, None if left is None else now + timedelta(seconds=left))
        return None if left is None else max(0.0, left)

    async def _expire(self, entry: Entry) -> float | None:
        if entry.expires is None:
            return None
        left = (entry.expires - self.kube.now()).total_seconds()
        if left <= 0:
            await self._delete(entry.resource)
            return None
        return left

    async def _delete(self, resource: Mapping[str, Any]) -> None:
        metadata = resource["metadata"]
        await self.kube.delete(FINETUNEJOBS, metadata["namespace"], metadata["name"], metadata["uid"])


def plan_of(resource: Mapping[str, Any], settings: OperatorSettings, is_new: bool) -> tuple[FineTuneJobSpec, Plan]:
    """The typed spec and what will run. Raises SpecError with every problem."""
    spec = parse_spec(resource["spec"], place=Place.CLUSTER)
    problems = policy_problems(spec, settings, resource["metadata"]) if is_new else []  # jobs that run are left alone
    if problems:
        raise SpecError(problems)
    metadata = resource["metadata"]
    identity = JobIdentity(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"])
    return spec, make_plan(spec, Facts(), identity)


def is_outdated(resource: Mapping[str, Any], job: JobView) -> bool:
    """Whether somebody has changed the blocks of the spec since the pods of the Job were made from them.

    The generation tells that it was somebody: what an older CRD no longer shows was changed by nobody.
    """
    if job.pods_digest is None or resource["metadata"].get("generation", 0) <= job.pods_generation:
        return False
    return job.pods_digest != pods_digest(resource["spec"])


def is_to_be_made_anew(resource: Mapping[str, Any], job: JobView) -> bool:
    """Whether the Job is outdated and has nothing left to say."""
    if not is_outdated(resource, job) or job.deleting or job.complete or job.failure or not job.suspended:
        return False
    return resource.get("status", {}).get("state") == "Suspended" and not job.active and not job.terminating


def pods_begin_anew(resource: Mapping[str, Any], job: JobView) -> str | None:
    """A word for the moment when pods start that are not the first ones, or that lack a volume; else nothing."""
    status = resource.get("status", {})
    number, state = status.get("totalAttempts", 0), status.get("state")
    lacks = any(c["reason"] == "VolumeNotReady" for c in status.get("conditions", ()) if c["type"] == "PodsReady")
    resumes = job.suspended and not run_policy(resource).get("suspend")
    if state == "Restarting" or lacks or resumes:
        return f"{'resumed' if resumes else state} after attempt {number}{' without a volume' if lacks else ''}"
    return None


def _waits_for_an_earlier_job(error: ApiError, observed: Observed) -> bool:
    """Whether what stands in the way may be a child of a job of the same name that was deleted a moment ago."""
    created = datetime.fromisoformat(observed.resource["metadata"]["creationTimestamp"])
    return error.status == 422 and (observed.now - created).total_seconds() < _GARBAGE_SECONDS


def _is_early(before: Mapping[str, Any], verdict: Verdict) -> bool:
    """Whether the first words about a job may wait: its pods were asked for a moment ago, and may run a moment later.

    Such a job then says Running at once. A status costs the API server more than all children together.
    """
    seconds = verdict.look_again_seconds
    quiet = not before.get("conditions") and not verdict.events and not verdict.commands
    return quiet and verdict.status.state == "Pending" and seconds is not None and seconds < WAITING_LOOK_SECONDS


def _is_only_a_date(before: Mapping[str, Any], after: Mapping[str, Any], changed: Collection[str]) -> bool:
    """Whether the launchers said what they had said before."""
    was, now = before.get("progress"), after.get("progress")
    if set(changed) != {"progress"} or was is None or now is None:
        return False
    return {**was, "updatedAt": None} == {**now, "updatedAt": None}


def _with_job(observed: Observed, job: JobView | None) -> Observed:
    return Observed(observed.resource, observed.now, job, observed.pods, observed.complaints, observed.progress)


def _count(resource: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Metrics of what the status says for the first time."""
    ended, total = before.get("totalAttempts") or 0, after.get("totalAttempts") or 0
    for attempt in after.get("attempts") or ():
        cause = attempt.get("cause")
        if cause and ended <= attempt["number"] < total and policy(cause).budget not in {Budget.NEVER, Budget.FREE}:
            RESTARTS.labels(cause=cause).inc()
    if after.get("state") != before.get("state") and after.get("state") in {"Complete", "Failed"}:
        seconds = (
            datetime.now(UTC) - datetime.fromisoformat(resource["metadata"]["creationTimestamp"])
        ).total_seconds()
        JOB_SECONDS.labels(outcome=after["state"]).observe(max(0.0, seconds))
