"""Everything the checks ask about, worked out once from an Observed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.plan import Plan
from finetune_api.status import Condition, FineTuneJobStatus, StatusAttempt, StatusCheckpoint
from finetune_operator.ends import stopping
from finetune_operator.ledger import Ledger, fold
from finetune_operator.observe import NO_INDEX, JobView, Object, Observed, PodView, parse_time, warn_once
from finetune_operator.progress_view import ProgressView, progress_view, status_checkpoint
from finetune_operator.settings import OperatorSettings

DEFAULT_MAX_RESTARTS = 3


@dataclass(frozen=True)
class Situation:
    """One job at one moment."""

    observed: Observed
    plan: Plan | None  # None: this version cannot read the spec of a job that another one has started
    nodes: int
    settings: OperatorSettings
    before: FineTuneJobStatus
    newest: tuple[PodView, ...]  # the newest pod of every index; empty if pods were not looked at
    ledger: Ledger
    view: ProgressView | None

    @property
    def job(self) -> JobView | None:
        return self.observed.job

    @property
    def now(self) -> datetime:
        return self.observed.now

    @property
    def artifact_prefix(self) -> str:
        """Where the artifact lies: an object URI that ends with "/"."""
        if self.plan is not None:
            return self.plan.artifact_prefix
        metadata, output = self.observed.resource["metadata"], self.observed.resource["spec"].get("output", {})
        parts = (str(output.get("uri", "")).rstrip("/"), metadata["namespace"], metadata["name"], metadata["uid"])
        return "/".join((*parts, ""))

    @property
    def all_ready(self) -> bool:
        """Whether every pod was seen ready; an attempt begins when their launchers have met."""
        ready = self.job is not None and self.job.ready >= self.nodes
        return ready and bool(self.newest) and all(pod.ready for pod in self.newest)

    @property
    def stopping(self) -> bool:
        """Whether its pods are asked to go away."""
        return stopping(self.observed)

    @property
    def max_restarts(self) -> int:
        return int(run_policy(self.observed.resource).get("maxRestarts", DEFAULT_MAX_RESTARTS))

    @property
    def living(self) -> tuple[PodView, ...]:
        """Pods that have not ended, also those that are asked to."""
        return tuple(pod for pod in self.observed.pods or () if not pod.ended)

    @property
    def progress_due(self) -> bool:
        """Whether a new page of progress may be written."""
        return is_due(self.before, self.now, self.settings.progress.interval_seconds)

    def checkpoint(self) -> StatusCheckpoint | None:
        """The newest checkpoint that anybody has named so far."""
        known = [self.before.checkpoint, self.view.checkpoint if self.view else None]
        for pod in self.observed.pods or ():
            said = pod.termination
            if said and said.checkpoint_step is not None and said.checkpoint_uri:
                known.append(status_checkpoint(said.checkpoint_step, said.checkpoint_uri, said.checkpoint_saved_at))
        named = [checkpoint for checkpoint in known if checkpoint is not None]
        return max(named, key=lambda checkpoint: checkpoint.step, default=None)

    def last_ended(self) -> StatusAttempt | None:
        """The last attempt, if it is over."""
        last = self.ledger.last
        return last if last is not None and last.ended_at is not None else None


def situation(observed: Observed, plan: Plan | None, settings: OperatorSettings) -> Situation:
    """Put together what the checks ask about."""
    observed = _of_the_job(observed)
    before = status_before(observed.resource)
    newest = newest_pods(observed.pods or ())
    pages = sorted(observed.progress, key=lambda page: page.node_rank)
    nodes = plan.nodes if plan is not None else observed.job.nodes if observed.job is not None else 1
    return Situation(
        observed=observed,
        plan=plan,
        nodes=nodes,
        settings=settings,
        before=before,
        newest=newest,
        ledger=fold(before, observed, newest),
        view=progress_view(pages, nodes, observed.now),
    )


def _of_the_job(observed: Observed) -> Observed:
    """Without pods that are no rank; their unreadable last words are noted."""
    if observed.pods is None:
        return observed
    ours = tuple(pod for pod in observed.pods if pod.index != NO_INDEX)
    for pod in ours:
        if pod.unread:
            warn_once(observed.resource, "the last word of a pod cannot be read", f"{pod.name}: {pod.unread}")
    return replace(observed, pods=ours)


def newest_pods(pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    """Of every index the pod that counts, by index."""
    newest: dict[int, PodView] = {}
    for pod in sorted(pods, key=lambda pod: (pod.created, pod.uid)):
        newest[pod.index] = pod
    return tuple(newest[index] for index in sorted(newest))


def status_before(resource: Object) -> FineTuneJobStatus:
    """The status that stands in the resource; what another version wrote and this one cannot read is left out.

    Fields that this version does not know are ignored at every depth: the ledger and what the budgets have spent stay.
    """
    raw: Mapping[str, Any] = resource.get("status") or {}
    try:
        return FineTuneJobStatus.model_validate(raw, extra="ignore")
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        warn_once(resource, "a part of the status cannot be read and is left out", where)
        readable: dict[str, Any] = {}
        for name, value in raw.items():
            if isinstance(value, list):
                value = [entry for entry in value if _reads({name: [entry]})]
            if _reads({name: value}):
                readable[name] = value
        return FineTuneJobStatus.model_validate(readable, extra="ignore")


def _reads(part: Mapping[str, Any]) -> bool:
    try:
        FineTuneJobStatus.model_validate(part, extra="ignore")
    except ValidationError:
        return False
    return True


def run_policy(resource: Object) -> Mapping[str, Any]:
    """``spec.runPolicy`` as it stands."""
    policy: Mapping[str, Any] = resource.get("spec", {}).get("runPolicy") or {}
    return policy


def condition(status: FineTuneJobStatus, kind: str) -> Condition | None:
    """One condition of a status."""
    return next((found for found in status.conditions if found.type == kind), None)


def is_true(status: FineTuneJobStatus, kind: str) -> bool:
    """Whether a condition holds."""
    found = condition(status, kind)
    return found is not None and found.status == "True"


def is_due(before: FineTuneJobStatus, now: datetime, interval_seconds: float) -> bool:
    """Whether the last page of progress is old enough."""
    updated = parse_time(before.progress.updated_at) if before.progress else None
    return updated is None or (now - updated).total_seconds() >= interval_seconds
