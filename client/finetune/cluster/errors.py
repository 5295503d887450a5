"""What the API server (or the way to it) refuses, in one sentence each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from finetune_api import API_GROUP, PLURAL
from finetune_api.errors import FineTuneError

JOBS = f"{PLURAL}.{API_GROUP}"
INSTALL = "helm install finetune-operator charts/finetune-operator --namespace finetune-system --create-namespace"
REFUSED_CODE = 1  # as kubectl: the cluster refused or could not be reached
TIMEOUT_CODE = 124  # as timeout(1)
_USER = re.compile(r'User "(?P<user>[^"]*)"')


class ClusterError(FineTuneError):
    """The cluster refused, or could not be asked. ``exit_code`` collides with no exit class of a job."""

    exit_code: int = REFUSED_CODE


class ClusterUnreachable(ClusterError):
    """No answer, or none that can be trusted; the same request may succeed later."""


class JobNotFound(ClusterError):
    """The named object does not exist."""


class JobExists(ClusterError):
    """An object of this name exists."""


class ClusterInvalid(ClusterError):
    """The API server found the object invalid although the local judge did not."""

    exit_code: int = 10


class WaitTimeout(ClusterError):
    """What was waited for did not happen in time."""

    exit_code: int = TIMEOUT_CODE


@dataclass(frozen=True)
class Request:
    """What was asked, in the words of RBAC. ``namespace`` ``None``: all of them."""

    verb: str
    resource: str
    namespace: str | None
    name: str = ""

    def __str__(self) -> str:
        place = f"in the namespace '{self.namespace}'" if self.namespace else "in all namespaces"
        return f"{self.verb} {self.resource} {place}"


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later: no answer, too many requests, server trouble, 410."""
    if isinstance(error, ApiException):
        return error.status in {0, 408, 410, 429} or (error.status or 0) >= 500
    return isinstance(error, HTTPError | OSError)


def translate(error: Exception, request: Request, server: str) -> ClusterError:
    """The sentence for an error of the Kubernetes client; ``server`` is its URL."""
    if not isinstance(error, ApiException):
        return ClusterUnreachable(
            f"the cluster at {server} cannot be reached: {_network_words(error)}",
            "see whether it runs, whether this machine can reach it, and whether the context is the right one",
        )
    status = _status(error)
    if error.status == 401:
        return ClusterError(
            f"the cluster at {server} does not accept the credentials of this context (401)",
            "log in again, or name another --context",
        )
    if error.status == 403:
        return _forbidden(status, request)
    if error.status == 404:
        return _not_found(status, request)
    if error.status == 409 and request.verb == "create":
        return JobExists(f"{request.resource} '{request.name}' exists in the namespace '{request.namespace}'")
    if error.status in {400, 422}:
        return _invalid(status, request)
    said = status.get("message") or error.reason or "no reason given"
    return ClusterUnreachable(f"the API server at {server} answered {error.status} to {request}: {said}", "try again")


def reason_of(error: Exception) -> str:
    """Why a request failed, in the words of whoever refused it, without saying which request."""
    if not isinstance(error, ApiException):
        return _network_words(error)
    reason = str(error.reason or "").partition(" -+-+- ")[0]  # of a refused handshake only its first line
    return str(_status(error).get("message") or reason or error.status)


def _network_words(error: BaseException) -> str:
    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, NameResolutionError):
        return "its name is not known here"
    if isinstance(error, SSLError):
        return f"TLS failed ({_last_words(error)})"
    if isinstance(error, ConnectTimeoutError) and not isinstance(error, NewConnectionError):
        return "it did not answer the connection in time"
    if isinstance(error, ReadTimeoutError):
        return "it accepted the request and did not answer in time"
    return _last_words(error)


def _last_words(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return str(error).rsplit(": ", 1)[-1].rstrip(")")


def _status(error: ApiException) -> dict[str, Any]:
    """The Status object of the answer; empty where the body is none (an unknown API group answers plain text)."""
    body = error.body
    try:
        status = json.loads(body) if body else {}
    except ValueError:
        return {}
    return status if isinstance(status, dict) else {}


def _forbidden(status: Mapping[str, Any], request: Request) -> ClusterError:
    message = str(status.get("message", ""))
    if "exceeded quota" in message or "admission webhook" in message or "denied" in message:
        return ClusterError(f"the cluster does not allow to {request}: {message}")
    user = _USER.search(message)
    who = f"the user '{user['user']}'" if user else "this user"
    return ClusterError(f"{who} may not {request}", "ask the administrator of the cluster for that permission")


def _not_found(status: Mapping[str, Any], request: Request) -> ClusterError:
    if request.resource == JOBS and status.get("kind") != "Status":
        return ClusterError(
            f"this cluster does not know FineTuneJobs (the CustomResourceDefinition {JOBS} is not installed)",
            f"install the operator (docs/install.md: which images to name): {INSTALL}",
        )
    if (status.get("details") or {}).get("kind") == "namespaces":
        return ClusterError(
            f"the namespace '{request.namespace}' does not exist",
            f"create it (kubectl create namespace {request.namespace}) or name another with --namespace",
        )
    return JobNotFound(f"there is no {request.resource} '{request.name}' in the namespace '{request.namespace}'")


def _invalid(status: Mapping[str, Any], request: Request) -> ClusterError:
    causes = (status.get("details") or {}).get("causes") or []
    told = [f"{cause.get('field') or 'object'}: {cause.get('message', '')}" for cause in causes]
    message = "; ".join(told) if told else str(status.get("message", "no reason given"))
    hint = ""
    if "strict decoding error" in message:
        hint = f"the CustomResourceDefinition of the cluster is of another version; compare it with: {CRD_COMMAND}"
    return ClusterInvalid(f"the API server refuses {request.name or request.resource}: {message}", hint)


CRD_COMMAND = f"kubectl get crd {JOBS} -o yaml"
