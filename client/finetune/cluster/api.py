"""What this command asks of a Kubernetes API server: FineTuneJobs, their pods, events and logs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from kubernetes.watch import Watch
from urllib3.exceptions import HTTPError

from finetune.cluster.errors import JOBS, ClusterError, JobNotFound, Request, is_transient, translate
from finetune.cluster.job import Job, read_job_object
from finetune.cluster.kubeconfig import Connection
from finetune_api import API_GROUP, API_VERSION, PLURAL
from finetune_api.names import nearest

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
WATCH_SECONDS = 30  # a watch that a silent network has cut is noticed after this and asked anew
OUTAGE_SECONDS = 300.0  # how long a follower puts up with an API server that does not answer
JOB_LABEL = "finetune.dev/job"
FIELD_MANAGER = "finetune-client"
_PAGE = 500
_KIND = (API_GROUP, API_VERSION)
_TIMES = (CONNECT_SECONDS, ANSWER_SECONDS)

T = TypeVar("T")


class Cluster:
    """One cluster, one namespace. Every error is a :class:`ClusterError` with one sentence."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.namespace = connection.namespace
        self.core = client.CoreV1Api(connection.api)
        self._custom = client.CustomObjectsApi(connection.api)

    def ask(self, request: Request, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call ``function`` of the Kubernetes client with bounded waiting; translate what it raises."""
        try:
            return function(*arguments, **{"_request_timeout": _TIMES} | options)
        except (ApiException, HTTPError, OSError) as error:
            raise translate(error, request, self.connection.server) from error

    def pod_log(self, name: str, query: list[tuple[str, Any]], timeouts: tuple[float, float]) -> Any:
        """The kubelet's answer, not read yet: urllib3's response, whatever its status.

        The client's own method has no ``sinceTime`` and takes every byte for UTF-8.
        """
        request = self.core.api_client.param_serialize(
            method="GET",
            resource_path="/api/v1/namespaces/{namespace}/pods/{name}/log",
            path_params={"namespace": self.namespace, "name": name},
            query_params=query,
            header_params={"Accept": "text/plain, application/json"},
            auth_settings=["BearerToken"],
        )
        return self.core.api_client.call_api(*request, _request_timeout=timeouts).response

    # ---- jobs

    def jobs(self, everywhere: bool = False, selector: str = "") -> list[Mapping[str, Any]]:
        """The objects of this namespace, or of all of them, page by page."""
        request = Request("list", JOBS, None if everywhere else self.namespace)
        found: list[Mapping[str, Any]] = []
        more = ""
        while True:
            page = {"limit": _PAGE, "label_selector": selector, **({"_continue": more} if more else {})}
            answer: Any
            if everywhere:
                answer = self.ask(request, self._custom.list_custom_object_for_all_namespaces, *_KIND, PLURAL, **page)
            else:
                answer = self.ask(
                    request, self._custom.list_namespaced_custom_object, *_KIND, self.namespace, PLURAL, **page
                )
            found += [{"apiVersion": answer["apiVersion"], "kind": "FineTuneJob", **item} for item in answer["items"]]
            more = answer["metadata"].get("continue") or ""
            if not more:
                return found

    def job(self, name: str) -> Job:
        """One job.

        Raises:
            JobNotFound: with the nearest name of this namespace.
        """
        try:
            return read_job_object(self._on_job("get", self._custom.get_namespaced_custom_object, name))
        except JobNotFound as error:
            raise self._nearest(name) from error

    def _nearest(self, name: str) -> JobNotFound:
        message = f"there is no FineTuneJob '{name}' in the namespace '{self.namespace}'"
        try:
            names = sorted(item["metadata"]["name"] for item in self.jobs())
        except ClusterError:  # may get but not list
            return JobNotFound(message)
        if guess := nearest(name, names):
            return JobNotFound(message, f"did you mean '{guess}'?")
        few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return JobNotFound(message, f"there are: {few}" if names else "there is none at all; name another --namespace")

    def create(self, manifest: Mapping[str, Any]) -> Job:
        """Create with strict field validation.

        Raises:
            JobExists: the name is taken.
        """
        name = str(manifest["metadata"]["name"])
        made: Any = self.ask(
            Request("create", JOBS, self.namespace, name),
            self._custom.create_namespaced_custom_object,
            *_KIND,
            self.namespace,
            PLURAL,
            dict(manifest),
            field_manager=FIELD_MANAGER,
            field_validation="Strict",
        )
        return read_job_object(made)

    def set_suspend(self, name: str, suspend: bool) -> Job:
        """Write ``spec.runPolicy.suspend`` and nothing else."""
        change = {"spec": {"runPolicy": {"suspend": suspend}}}
        return read_job_object(
            self._on_job(
                "patch",
                self._custom.patch_namespaced_custom_object,
                name,
                change,
                field_manager=FIELD_MANAGER,
                field_validation="Strict",
                _content_type="application/merge-patch+json",
            )
        )

    def delete(self, job: Job) -> None:
        """Delete this very object (a successor of the same name stays)."""
        self._on_job(
            "delete",
            self._custom.delete_namespaced_custom_object,
            job.name,
            body=client.V1DeleteOptions(
                propagation_policy="Background", preconditions=client.V1Preconditions(uid=job.uid)
            ),
        )

    def _on_job(self, verb: str, function: Callable[..., Any], name: str, *arguments: Any, **options: Any) -> Any:
        request = Request(verb, JOBS, self.namespace, name)
        return self.ask(request, function, *_KIND, self.namespace, PLURAL, name, *arguments, **options)

    def follow(self, name: str, deadline: float | None = None) -> Iterator[Job | None]:
        """The job now and after every change, until ``deadline`` (``time.monotonic()``); ``None`` once it is deleted.

        The same state may come twice. Connections that break and versions that are too old (410) are taken up again
        from a fresh look; an API server that stays away for OUTAGE_SECONDS is an error.
        """
        first = self.job(name)
        yield first
        silent_since: float | None = None
        while deadline is None or time.monotonic() < deadline:
            try:
                for job in self._look_and_watch(name, deadline):
                    silent_since = None
                    gone = job is None or job.uid != first.uid
                    yield None if gone else job
                    if gone:
                        return
                silent_since = None
            except (ApiException, HTTPError, OSError) as error:
                now = time.monotonic()
                silent_since = silent_since or now
                if not is_transient(error) or now - silent_since > OUTAGE_SECONDS:
                    raise translate(
                        error, Request("watch", JOBS, self.namespace, name), self.connection.server
                    ) from error
                time.sleep(min(1.0, max(0.0, deadline - now)) if deadline is not None else 1.0)

    def _look_and_watch(self, name: str, deadline: float | None) -> Iterator[Job | None]:
        selected: dict[str, Any] = {"field_selector": f"metadata.name={name}"}
        where = (*_KIND, self.namespace, PLURAL)
        listed: Any = self._custom.list_namespaced_custom_object(*where, **selected, _request_timeout=_TIMES)
        yield read_job_object(listed["items"][0]) if listed["items"] else None
        left = WATCH_SECONDS if deadline is None else min(WATCH_SECONDS, math.ceil(deadline - time.monotonic()))
        if left <= 0:
            return
        events = Watch().stream(
            self._custom.list_namespaced_custom_object,
            *where,
            **selected,
            resource_version=listed["metadata"]["resourceVersion"],
            timeout_seconds=left,
            _request_timeout=(CONNECT_SECONDS, left + CONNECT_SECONDS),
        )
        for event in events:
            yield None if event["type"] == "DELETED" else read_job_object(event["object"])

    # ---- what belongs to a job

    def pods(self, job: Job) -> list[Any]:
        """Its pods (V1Pod), dead and alive, oldest first. Those of an earlier job of its name are older than it."""
        listed: Any = self.ask(
            Request("list", "pods", self.namespace),
            self.core.list_namespaced_pod,
            self.namespace,
            label_selector=f"{JOB_LABEL}={job.name}",
        )
        own = [pod for pod in listed.items if pod.metadata.creation_timestamp >= job.created]
        return sorted(own, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def events(self, job: Job) -> list[Any]:
        """The Events (CoreV1Event) about the job itself, oldest first; they are kept for about an hour."""
        listed: Any = self.ask(
            Request("list", "events", self.namespace),
            self.core.list_namespaced_event,
            self.namespace,
            field_selector=f"involvedObject.uid={job.uid}",
        )
        return sorted(listed.items, key=event_time)


def event_time(event: Any) -> Any:
    """When an Event happened last."""
    series = event.series.last_observed_time if event.series else None
    return series or event.last_timestamp or event.event_time or event.metadata.creation_timestamp


def open_cluster(kubeconfig: str | None, context: str | None, namespace: str | None) -> Cluster:
    """The cluster that the options name."""
    from finetune.cluster.kubeconfig import connect

    return Cluster(connect(kubeconfig, context, namespace))
