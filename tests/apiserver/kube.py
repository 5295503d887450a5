"""What a test says to an API server: plain HTTPS, plain dicts, nothing hidden."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlencode

import urllib3

if TYPE_CHECKING:
    from tests.apiserver.server import RunningServer

Document = dict[str, Any]
T = TypeVar("T")

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

# kind -> (path of the group and version, plural, namespaced)
_KINDS = {
    "Namespace": ("/api/v1", "namespaces", False),
    "Node": ("/api/v1", "nodes", False),
    "Pod": ("/api/v1", "pods", True),
    "Service": ("/api/v1", "services", True),
    "ConfigMap": ("/api/v1", "configmaps", True),
    "Secret": ("/api/v1", "secrets", True),
    "Event": ("/api/v1", "events", True),
    "ServiceAccount": ("/api/v1", "serviceaccounts", True),
    "ResourceQuota": ("/api/v1", "resourcequotas", True),
    "LimitRange": ("/api/v1", "limitranges", True),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims", True),
    "Job": ("/apis/batch/v1", "jobs", True),
    "Deployment": ("/apis/apps/v1", "deployments", True),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies", True),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets", True),
    "PriorityClass": ("/apis/scheduling.k8s.io/v1", "priorityclasses", False),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases", True),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles", True),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings", True),
    "ClusterRole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "CustomResourceDefinition": ("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", False),
    "FineTuneJob": ("/apis/finetune.dev/v1alpha1", "finetunejobs", True),
    "ServiceMonitor": ("/apis/monitoring.coreos.com/v1", "servicemonitors", True),
    "PodMonitor": ("/apis/monitoring.coreos.com/v1", "podmonitors", True),
    "PrometheusRule": ("/apis/monitoring.coreos.com/v1", "prometheusrules", True),
}


class Unreachable(Exception):
    """No answer at all."""


class Refused(Exception):
    """The API server said no: ``code``, ``reason`` and ``message`` of its Status."""

    def __init__(self, code: int, status: Document) -> None:
        self.code = code
        self.status = status
        self.reason: str = status.get("reason", "")
        self.message: str = status.get("message", "")
        super().__init__(f"{code} {self.reason}: {self.message}")


class Answer(NamedTuple):
    code: int
    body: Any
    warnings: list[str]


class Kube:
    """A client of one identity. ``namespace`` is used where neither the object nor the call names one."""

    def __init__(self, server: RunningServer, *, token: str = "", namespace: str = "default") -> None:
        self.server = server
        self.namespace = namespace
        self.timeout_seconds = 30.0  # of one request
        self._headers = {"Authorization": f"Bearer {token or server.token}"}
        self._pool = urllib3.PoolManager(ca_certs=str(server.ca_file), retries=False, maxsize=8)

    def __enter__(self) -> Kube:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    # ---- any request

    def call(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json", **query: str
    ) -> Answer:
        """One request; never raises for a status code. JSON bodies are parsed, others are text."""
        url = self.server.url + path + (f"?{urlencode(query)}" if query else "")
        headers = self._headers | ({"Content-Type": content_type} if body is not None else {})
        try:
            content = None if body is None else json.dumps(body)
            response = self._pool.request(method, url, body=content, headers=headers, timeout=self.timeout_seconds)
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(str(error)) from None
        parsed: Any = response.data.decode()
        if response.headers.get("Content-Type", "").startswith("application/json"):
            parsed = json.loads(parsed)
        return Answer(response.status, parsed, response.headers.getlist("Warning"))

    def _send(self, method: str, path: str, body: Any = None, **options: str) -> Document:
        answer = self.call(method, path, body, **options)
        if answer.code >= 300:
            status = answer.body if isinstance(answer.body, dict) else {"message": str(answer.body)}
            raise Refused(answer.code, status)
        return dict(answer.body)

    # ---- objects

    def path(self, kind: str, name: str = "", *, namespace: str = "", subresource: str = "") -> str:
        group, plural, namespaced = _KINDS[kind]
        scope = f"/namespaces/{namespace or self.namespace}" if namespaced else ""
        return f"{group}{scope}/{plural}" + (f"/{name}" if name else "") + (f"/{subresource}" if subresource else "")

    def _path_of(self, item: Document, *, named: bool, subresource: str = "") -> str:
        metadata = item["metadata"]
        namespace = metadata.get("namespace", "")
        return self.path(item["kind"], metadata["name"] if named else "", namespace=namespace, subresource=subresource)

    def create(self, item: Document, **query: str) -> Document:
        """POST with strict field validation, as kubectl does."""
        return self._send("POST", self._path_of(item, named=False), item, **{"fieldValidation": "Strict"} | query)

    def apply(self, item: Document, **query: str) -> Document:
        """Server-side apply with force, field manager ``test``."""
        query = {"fieldManager": "test", "force": "true", "fieldValidation": "Strict"} | query
        return self._send("PATCH", self._path_of(item, named=True), item, content_type=APPLY, **query)

    def replace(self, item: Document, *, subresource: str = "") -> Document:
        return self._send("PUT", self._path_of(item, named=True, subresource=subresource), item)

    def patch(
        self, kind: str, name: str, change: Document, *, namespace: str = "", subresource: str = "", **query: str
    ) -> Document:
        """JSON merge patch with strict field validation."""
        path = self.path(kind, name, namespace=namespace, subresource=subresource)
        return self._send("PATCH", path, change, content_type=MERGE, **{"fieldValidation": "Strict"} | query)

    def get(self, kind: str, name: str, *, namespace: str = "") -> Document:
        return self._send("GET", self.path(kind, name, namespace=namespace))

    def find(self, kind: str, name: str, *, namespace: str = "") -> Document | None:
        """The object, or None when there is none."""
        try:
            return self.get(kind, name, namespace=namespace)
        except Refused as error:
            if error.code == 404:
                return None
            raise

    def list(self, kind: str, *, namespace: str = "", selector: str = "") -> list[Document]:
        query = {"labelSelector": selector} if selector else {}
        answer = self._send("GET", self.path(kind, namespace=namespace), **query)
        api_version = answer["apiVersion"]
        return [{"apiVersion": api_version, "kind": kind, **item} for item in answer["items"]]

    def delete(self, kind: str, name: str, *, namespace: str = "", grace_seconds: int | None = None) -> None:
        """Background deletion. ``grace_seconds=0`` removes a pod at once, as a kubelet does at the end."""
        body: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        self._send("DELETE", self.path(kind, name, namespace=namespace), body)

    def account_token(self, name: str, *, namespace: str = "") -> str:
        """A token of a ServiceAccount (TokenRequest), good for an hour."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        answer = self._send(
            "POST", self.path("ServiceAccount", name, namespace=namespace, subresource="token"), request
        )
        return str(answer["status"]["token"])

    # ---- waiting

    def wait(self, question: Callable[[], T | None], what: str, seconds: float = 60.0) -> T:
        """Asks until the answer is true; fails with ``what`` was awaited."""
        return wait(question, what, seconds)

    def watch(self, kind: str, *, namespace: str = "", **query: str) -> Iterator[Document]:
        """Watch events until the server closes the stream."""
        url = f"{self.server.url}{self.path(kind, namespace=namespace)}?{urlencode({'watch': 'true'} | query)}"
        response = self._pool.request("GET", url, headers=self._headers, preload_content=False)
        rest = b""
        for chunk in response.stream(None):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield json.loads(line)


def wait(question: Callable[[], T | None], what: str, seconds: float = 60.0, pause: float = 0.02) -> T:
    """Asks every ``pause`` seconds until the answer is true and returns it."""
    deadline = time.monotonic() + seconds
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"Waited {seconds:g} s in vain until {what}.")
        time.sleep(pause)
