"""What is known of one job right now: read once, typed, never changed. Every decision is made from an Observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.fields import SchemaModel
from finetune_api.report import Progress, Termination
from finetune_operator.logs import log_of
from finetune_operator.sentences import as_sentence, cut

PODS_DIGEST, PODS_GENERATION = "finetune.dev/pods-digest", "finetune.dev/pods-generation"  # annotations of the Job
JOB_LABEL = "finetune.dev/job"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
TRAINER = "trainer"  # name of the training container

NO_INDEX = -1  # of a pod that is none of the Job's

Object = Mapping[str, Any]  # a Kubernetes object as JSON
Model = TypeVar("Model", bound=SchemaModel)

_MATTERS_REMEMBERED = 10_000
_told: set[tuple[str, str]] = set()  # what the log has said: (uid of a job, matter)


@dataclass(frozen=True)
class JobView:
    """The Indexed Job of a FineTuneJob."""

    name: str
    uid: str
    created: datetime
    suspended: bool  # as asked: spec.suspend
    active_deadline_seconds: int | None
    config_map: str | None  # the one its pods mount
    nodes: int
    active: int = 0
    ready: int = 0
    succeeded: int = 0
    failed: int = 0
    terminating: int = 0
    started: datetime | None = None
    complete: bool = False
    failure: tuple[str, str] | None = None  # (reason, message) of its Failed or FailureTarget condition
    deleting: bool = False
    owner: str = ""  # uid of the FineTuneJob that it belongs to
    pods_digest: str | None = None  # of the blocks of the spec that its pods were made from
    pods_generation: int = 0  # of that spec
    held: bool = False  # as done: the Job controller has suspended it, and has not resumed it yet
    resumed: datetime | None = None  # when the Job controller last did


@dataclass(frozen=True)
class PodView:
    """One pod of the Job, dead or alive. Several may share an index; the newest one counts."""

    name: str
    uid: str
    index: int  # its rank among the nodes, or NO_INDEX
    created: datetime
    phase: str  # Pending | Running | Succeeded | Failed | Unknown
    node: str = ""
    address: str = ""
    ready: bool = False
    started: datetime | None = None  # of the training container
    finished: datetime | None = None
    failed: datetime | None = None  # about when; also of a pod none of whose containers ever ran
    exit_code: int | None = None
    killed_for_memory: bool = False
    memory_limit: str = ""  # of the training container, whoever set it
    reason: str = ""  # status.reason: Evicted, NodeLost, ...
    message: str = ""
    unschedulable: str = ""  # the scheduler's own words
    waiting: tuple[str, str] = ("", "")  # (reason, message) of a container that cannot start
    image: str = ""
    disruption: tuple[str, str] = ("", "")  # (reason, message) of condition DisruptionTarget
    deleted: datetime | None = None  # deletionTimestamp: when the grace period ends
    asked_to_go: datetime | None = None  # when it began
    termination: Termination | None = None  # the launcher's last word
    unread: str = ""  # why there is none although the container left one

    @property
    def ended(self) -> bool:
        return self.phase in {"Succeeded", "Failed"}


@dataclass(frozen=True)
class Observed:
    """Everything a verdict may depend on."""

    resource: Object  # the FineTuneJob
    now: datetime
    job: JobView | None = None
    pods: tuple[PodView, ...] | None = None  # None: not looked at this time, nothing may be concluded
    complaints: tuple[str, ...] = ()  # Warning events about Job and pods, newest first (quota, volumes, ...)
    progress: tuple[Progress, ...] = ()  # what reachable launchers said, by node rank

    @property
    def generation(self) -> int:
        return int(self.resource["metadata"].get("generation", 1))


def parse_time(text: str | None) -> datetime | None:
    """RFC 3339 -> aware datetime."""
    return datetime.fromisoformat(text) if text else None


def job_view(job: Object) -> JobView:
    """A batch/v1 Job as :class:`JobView`."""
    metadata, spec, status = job["metadata"], job["spec"], job.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", ()) if c["status"] == "True"}
    failed = conditions.get("Failed") or conditions.get("FailureTarget")
    suspension: Object = next((c for c in status.get("conditions", ()) if c["type"] == "Suspended"), {})
    volumes = spec["template"]["spec"].get("volumes", ())
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        suspended=bool(spec.get("suspend")),
        active_deadline_seconds=spec.get("activeDeadlineSeconds"),
        config_map=next((v["configMap"]["name"] for v in volumes if "configMap" in v), None),
        nodes=spec.get("completions", 1),
        active=status.get("active", 0),
        ready=status.get("ready", 0),
        succeeded=status.get("succeeded", 0),
        failed=status.get("failed", 0),
        terminating=status.get("terminating", 0),
        started=parse_time(status.get("startTime")),
        complete="Complete" in conditions or "SuccessCriteriaMet" in conditions,
        failure=(failed.get("reason", ""), failed.get("message", "")) if failed else None,
        deleting="deletionTimestamp" in metadata,
        owner=controller_of(metadata),
        pods_digest=metadata.get("annotations", {}).get(PODS_DIGEST),
        pods_generation=int(metadata.get("annotations", {}).get(PODS_GENERATION, 0)),
        held=suspension.get("status") == "True",
        resumed=parse_time(suspension.get("lastTransitionTime")) if suspension.get("status") == "False" else None,
    )


def controller_of(metadata: Object) -> str:
    """The uid of the controller that an object belongs to, or nothing."""
    owners = metadata.get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), "")


def is_controlled_by_job(metadata: Object, name: str) -> bool:
    """Whether the controller that an object belongs to is a Job of this name."""
    owners = metadata.get("ownerReferences") or ()
    return any(owner.get("controller") and (owner["kind"], owner["name"]) == ("Job", name) for owner in owners)


def pod_view(pod: Object) -> PodView:
    """A core/v1 Pod as :class:`PodView`."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    conditions = {c["type"]: c for c in status.get("conditions", ())}
    asked: Object = next((c for c in spec["containers"] if c["name"] == TRAINER), {})
    container: Object = next((c for c in status.get("containerStatuses", ()) if c["name"] == TRAINER), {})
    state = container.get("state", {})
    terminated, waiting = state.get("terminated", {}), state.get("waiting", {})
    scheduled, disrupted = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    is_unschedulable = scheduled.get("status") == "False"
    deleted = parse_time(metadata.get("deletionTimestamp"))
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    termination, unread = parse_termination(terminated.get("message"))
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        index=pod_index(metadata),
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        phase=status.get("phase", "Unknown"),
        node=spec.get("nodeName", ""),
        address=status.get("podIP", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        started=parse_time(terminated.get("startedAt") or state.get("running", {}).get("startedAt")),
        finished=parse_time(terminated.get("finishedAt")),
        failed=_failed_at(pod) if status.get("phase") == "Failed" else None,
        exit_code=terminated.get("exitCode"),
        killed_for_memory=terminated.get("reason") == "OOMKilled",
        memory_limit=str(asked.get("resources", {}).get("limits", {}).get("memory", "")),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        unschedulable=scheduled.get("message", "") if is_unschedulable else "",
        waiting=(waiting.get("reason", ""), waiting.get("message", "")),
        image=asked.get("image", ""),
        disruption=(disrupted.get("reason", ""), disrupted.get("message", ""))
        if disrupted.get("status") == "True"
        else ("", ""),
        deleted=deleted,
        asked_to_go=deleted - grace if deleted is not None else None,
        termination=termination,
        unread=unread,
    )


def _failed_at(pod: Object) -> datetime | None:
    """The newest that the pod itself tells: a kubelet that rejects one dates nothing."""
    status = pod["status"]
    moved = [parse_time(condition.get("lastTransitionTime")) for condition in status.get("conditions", ())]
    times = [*moved, parse_time(status.get("startTime")), parse_time(pod["metadata"]["creationTimestamp"])]
    return max((time for time in times if time is not None), default=None)


def pod_index(metadata: Object) -> int:
    """The completion index of a pod of an Indexed Job; NO_INDEX if it says none: such a pod is no rank."""
    text = metadata.get("labels", {}).get(INDEX_LABEL) or metadata.get("annotations", {}).get(INDEX_LABEL) or ""
    return int(text) if text.isascii() and text.isdecimal() else NO_INDEX


# ---- what launchers say: those of another version may say more, which is ignored at every depth --------------------


def parse_progress(text: str | bytes, resource: Object | None = None) -> Progress | None:
    """A launcher's page. One that cannot be read is noted in the log of the job ``resource``, once."""
    page, unread = _read(Progress, text)
    if unread and resource is not None:
        warn_once(resource, "a launcher's page of progress cannot be read", unread)
    return page


def parse_termination(message: str | None) -> tuple[Termination | None, str]:
    """A launcher's last word, or nothing and why it cannot be read: the image's own words, or cut short."""
    return _read(Termination, message) if message else (None, "")


def _read(model: type[Model], text: str | bytes) -> tuple[Model | None, str]:
    try:
        return model.model_validate_json(text, extra="ignore"), ""
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            words = text if isinstance(text, str) else text.decode(errors="replace")
            return None, cut(as_sentence(words), 200)
        return None, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def warn_once(resource: Object, matter: str, why: str) -> None:
    """Say in the log what is wrong with a job: once, not at every look."""
    key = (resource["metadata"].get("uid", ""), matter)
    if key in _told:
        return
    if len(_told) >= _MATTERS_REMEMBERED:
        _told.clear()
    _told.add(key)
    log_of(resource).warning("%s: %s", matter, why)
