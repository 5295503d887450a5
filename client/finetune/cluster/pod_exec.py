"""A program in a pod, read through a websocket that is bounded in time like every other request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream, ws_client
from websocket import WebSocket

from finetune.cluster.api import ANSWER_SECONDS, Cluster

_HANDSHAKE = re.compile(r"Handshake status (?P<code>\d+)")


class _BoundedWebSocket(WebSocket):
    """The library has no option for how long a connection and its handshake may take, and waits for ever."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.settimeout(ANSWER_SECONDS)


ws_client.WebSocket = _BoundedWebSocket  # type: ignore[attr-defined, assignment]


def open_exec(cluster: Cluster, pod: str, container: str, command: Sequence[str]) -> Any:
    """Start a program in a pod. A refused handshake becomes the ApiException that it means."""
    try:
        return stream(
            cluster.core.connect_get_namespaced_pod_exec,
            pod,
            cluster.namespace,
            container=container,
            command=list(command),
            stdout=True,
            stderr=True,
            stdin=False,
            tty=False,
            binary=True,
            _preload_content=False,
        )
    except ApiException as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # the library takes it for a failure of its own
            raise KeyboardInterrupt from None
        if refused := _HANDSHAKE.search(str(error.reason)):
            raise ApiException(status=int(refused["code"]), reason=error.reason) from error
        raise
