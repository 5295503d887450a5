"""As much of a Kubernetes client as starting a cluster needs: GET and server-side apply over the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from typing import Any

from deploy.local.cluster.layout import API_PORT, HOST, ClusterError, Layout


class Api:
    """The API server as the administrator."""

    def __init__(self, layout: Layout) -> None:
        self._context = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
        self._context.load_cert_chain(layout.pki / "admin.crt", layout.pki / "admin.key")

    def ready(self) -> bool:
        """Whether /readyz says so."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._request("GET", "/readyz")[0] == 200
        return False

    def get(self, path: str) -> Any:
        """The object at ``path``, or None where there is none.

        Raises:
            ClusterError: any other answer, or none.
        """
        status, body = self._answer("GET", path)
        if status == 404:
            return None
        if status != 200:
            raise ClusterError(f"The API server answers {status} to GET {path}: {body[:500].decode(errors='replace')}")
        return json.loads(body)

    def apply(self, path: str, manifest: dict[str, Any]) -> None:
        """Create or change the object at ``path``.

        Raises:
            ClusterError: the server refuses, or does not answer.
        """
        target = f"{path}?fieldManager=finetune-cluster&force=true"
        status, body = self._answer("PATCH", target, json.dumps(manifest), "application/apply-patch+yaml")
        if status not in (200, 201):
            raise ClusterError(f"The API server answers {status} to {path}: {body[:500].decode(errors='replace')}")

    def _answer(self, *words: str) -> tuple[int, bytes]:
        try:
            return self._request(*words)
        except (OSError, http.client.HTTPException) as error:
            raise ClusterError(f"The API server at https://{HOST}:{API_PORT} does not answer: {error}.") from error

    def _request(
        self, method: str, path: str, body: str | None = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection(HOST, API_PORT, context=self._context, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": content_type, "Accept": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
