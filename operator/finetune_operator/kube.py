"""The API server as the operator uses it: JSON objects in and out through kubernetes' asyncio client.

The client's typed models are passed by: they cost milliseconds per object and drop fields that they do not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from finetune_api import API_GROUP, API_VERSION, PLURAL
from finetune_operator.metrics import API_REQUESTS

FIELD_MANAGER = "finetune-operator"
PROGRESS_MANAGER = "finetune-operator-progress"
REQUEST_SECONDS = 30.0
CONNECT_SECONDS = 5.0  # TCP and TLS: a network that swallows packets for a moment must not cost a whole request
CONNECTIONS = 48  # more only cost handshakes: two cores of an API server are busy with 32
PAGE = 500  # objects of one LIST
# Seconds. A look that failed would wait longer, and ask everything anew.
_PAUSES_AFTER_A_BROKEN_CONNECTION = (0.05, 0.2)
_BROKEN = "Disconnected"
_SAME_TIME = timedelta(seconds=3)

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A resource of the API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(("namespaces", namespace) if namespace else ()), self.plural, name, subresource]
        return "/".join(part for part in parts if part)


FINETUNEJOBS = Kind(API_GROUP, API_VERSION, PLURAL)
JOBS = Kind("batch", "v1", "jobs")
PODS = Kind("", "v1", "pods")
SERVICES = Kind("", "v1", "services")
CONFIG_MAPS = Kind("", "v1", "configmaps")
CORE_EVENTS = Kind("", "v1", "events")
EVENTS = Kind("events.k8s.io", "v1", "events")
LEASES = Kind("coordination.k8s.io", "v1", "leases")
KINDS = {"Job": JOBS, "Service": SERVICES, "ConfigMap": CONFIG_MAPS}


class ApiError(Exception):
    """The API server refused, or did not answer (``status`` 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_seconds = retry_after_seconds

    @property
    def retriable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in {0, 408, 409, 429} or self.status >= 500


class Kube:
    """One connection pool. Every method raises :class:`ApiError`."""

    def __init__(self, client: ApiClient, connections: int = CONNECTIONS) -> None:
        self._client = client
        self._turns = asyncio.Semaphore(connections)  # in order: aiohttp's own pool lets latecomers go first
        self._ahead = timedelta()  # of us: how much later it is at the API server

    def now(self) -> datetime:
        """The API server's time: what it has dated is never compared with a node's clock that goes wrong."""
        return datetime.now(UTC) + self._ahead

    @classmethod
    async def connect(cls, connections: int = CONNECTIONS) -> Kube:
        """In a pod by its service account, else by the kubeconfig as kubectl finds it."""
        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = connections
        # By itself aiohttp looks for proxies and .netrc at every request, in a thread: a quarter of our time.
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.proxy = configuration.proxy or _proxy(configuration.host)
        return cls(ApiClient(configuration), connections)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        return await self._request("GET", kind, kind.path(namespace, name))

    async def list(
        self, kind: Kind, namespace: str | None, label_selector: str = "", field_selector: str = ""
    ) -> list[Object]:
        """All matching objects."""
        return [item async for item in self.each(kind, namespace, label_selector, field_selector)]

    async def each(
        self, kind: Kind, namespace: str | None, label_selector: str = "", field_selector: str = ""
    ) -> AsyncIterator[Object]:
        """All matching objects, with one page of them in memory at a time."""
        query = {"limit": str(PAGE), "labelSelector": label_selector, "fieldSelector": field_selector}
        while True:
            page = await self._request("GET", kind, kind.path(namespace), query=query, verb="list")
            for item in page.get("items", ()):
                yield item
            token = page["metadata"].get("continue")
            if not token:
                return
            query["continue"] = token

    async def peek(self, kind: Kind, namespace: str | None) -> str:
        """One object at most: whether the kind is served and may be listed; the resourceVersion of now."""
        page = await self._request("GET", kind, kind.path(namespace), query={"limit": "1"}, verb="list")
        return str(page["metadata"]["resourceVersion"])

    async def apply(self, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply: brought back to what the manifest says (or created) by our own field manager."""
        kind, metadata = KINDS[manifest["kind"]], manifest["metadata"]
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        path = kind.path(metadata["namespace"], metadata["name"])
        return await self._request("PATCH", kind, path, query, manifest, "application/apply-patch+yaml", "apply")

    async def ensure(self, manifest: Mapping[str, Any]) -> Object:
        """Created, or if it exists applied: a create costs the API server three fifths of an apply that creates."""
        try:
            return await self.create(KINDS[manifest["kind"]], manifest)
        except ApiError as error:
            if error.status != 409:
                raise
        return await self.apply(manifest)

    async def create(self, kind: Kind, manifest: Mapping[str, Any]) -> Object:
        query = {"fieldManager": FIELD_MANAGER}
        path = kind.path(manifest["metadata"]["namespace"])
        return await self._request("POST", kind, path, query, manifest, "application/json", "create")

    async def merge(
        self,
        kind: Kind,
        resource: Mapping[str, Any],
        body: Mapping[str, Any],
        subresource: str | None = None,
        manager: str = FIELD_MANAGER,
    ) -> Object:
        """JSON merge patch of ``resource``, refused with 409 if it has changed since it was read."""
        metadata = resource["metadata"]
        body = {**body, "metadata": {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]}}
        path = kind.path(metadata["namespace"], metadata["name"], subresource)
        query = {"fieldManager": manager}
        return await self._request("PATCH", kind, path, query, body, "application/merge-patch+json", "patch")

    async def give_up_pod(self, namespace: str, name: str, uid: str) -> None:
        """Remove exactly this pod, whose node is gone and will never say that it has ended; gone already is fine.

        A Job keeps its finalizer on a pod that runs, deleted or not, and replaces only pods that have failed
        (``podReplacementPolicy: Failed``), so it is failed first, as Kubernetes' own garbage collector of pods does.
        """
        words = {"phase": "Failed", "reason": "NodeLost", "message": "its node did not confirm that it ended"}
        path, body = PODS.path(namespace, name, "status"), {"metadata": {"uid": uid}, "status": words}
        query = {"fieldManager": FIELD_MANAGER}
        try:
            await self._request("PATCH", PODS, path, query, body, "application/merge-patch+json", "patch")
        except ApiError as error:
            if error.status not in {404, 409}:
                raise
        await self.delete(PODS, namespace, name, uid, force=True)

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, force: bool = False) -> None:
        """Delete exactly the object with this uid; gone already is fine."""
        body: Object = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if force:
            body["gracePeriodSeconds"] = 0
        try:
            await self._request("DELETE", kind, kind.path(namespace, name), None, body, "application/json", "delete")
        except ApiError as error:
            if error.status not in {404, 409}:
                raise

    async def _request(
        self,
        method: str,
        kind: Kind,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        verb: str = "",
    ) -> Object:
        """Send it, and again if the connection broke: every write of ours may arrive twice (then it gets a 409)."""
        send = partial(self._send, method, kind, path, query, body, content_type, verb or method.lower())
        for pause in _PAUSES_AFTER_A_BROKEN_CONNECTION:
            try:
                return await send()
            except ApiError as error:
                if error.reason != _BROKEN:
                    raise
            await asyncio.sleep(pause * random.uniform(1.0, 2.0))
        return await send()

    async def _send(
        self,
        method: str,
        kind: Kind,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        verb: str,
    ) -> Object:
        code = "none"
        try:
            serialized = await self._client.param_serialize(
                method,
                path,
                query_params=[(key, value) for key, value in (query or {}).items() if value],
                header_params={"Accept": "application/json", "Content-Type": content_type},
                auth_settings=["BearerToken"],
            )
            url, headers = serialized[1], serialized[2]
            limit = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
            async with self._turns:
                response = await self._client.call_api(method, url, headers, body, None, _request_timeout=limit)
                text = await response.read()
            code = str(response.status)
        except (TimeoutError, aiohttp.ClientError, ssl.SSLError, OSError) as error:
            unsent = isinstance(error, aiohttp.ConnectionTimeoutError)
            broken = isinstance(error, aiohttp.ClientConnectionError) and (
                unsent or not isinstance(error, TimeoutError)
            )
            message = f"the API server did not answer ({type(error).__name__}: {error})"
            raise ApiError(0, _BROKEN if broken else "Unreachable", message) from error
        finally:
            API_REQUESTS.labels(verb=verb, resource=kind.plural, code=code).inc()
        self._note_time(response.headers.get("Date"))
        if response.status >= 300:
            raise _refused(response.status, text, response.headers.get("Retry-After"))
        decoded: Object = json.loads(text)
        return decoded

    def _note_time(self, date: str | None) -> None:
        """The header (RFC 9110) has whole seconds and was on its way for a while: small differences are none."""
        with contextlib.suppress(ValueError):
            ahead = parsedate_to_datetime(date) - datetime.now(UTC) if date else timedelta()
            self._ahead = ahead if abs(ahead) > _SAME_TIME else timedelta()


def _proxy(server: str) -> str | None:
    """The proxy that the environment names for ``server``."""
    parts = urlsplit(server)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


def _refused(status: int, text: bytes, retry_after: str | None) -> ApiError:
    try:
        said = json.loads(text)
        reason, message = said.get("reason", ""), said.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", text[:200].decode(errors="replace")
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    return ApiError(status, reason or str(status), message or f"HTTP status {status}", seconds)
