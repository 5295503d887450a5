"""The launcher's three pages: ``/metrics`` (Prometheus), ``/progress`` (JSON), ``/healthz``."""

from __future__ import annotations

import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_trainer.metrics import TrainerCollector
from finetune_trainer.status import LauncherStatus

HOST_VARIABLE = "FINETUNE_METRICS_HOST"  # absent: every address of this machine


class MetricsPortError(FineTuneError):
    """The metrics port cannot be opened."""

    exit_class = ExitClass.INVALID_SPEC


class StatusServer:
    """Serves in threads of its own until the process ends. ``port`` is the one really open."""

    def __init__(self, status: LauncherStatus, port: int) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(TrainerCollector(status))
        host = os.environ.get(HOST_VARIABLE, "")
        try:
            self._server = _Server(host, port, status, registry)
        except OSError as error:
            raise MetricsPortError(
                f"the metrics port {port} cannot be opened: {error.strerror or error}",
                "set metricsPort to a free port, or to 0 for any",
            ) from error
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, status: LauncherStatus, registry: CollectorRegistry) -> None:
        self.status = status
        self.registry = registry
        both = host in {"", "::"} and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if both or ":" in host else socket.AF_INET
        super().__init__(("::" if both else host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that went away is not news; anything else is."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "finetune-trainer"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, content_type, encoder(self.server.registry))
        elif path == "/progress":
            text = self.server.status.progress().model_dump_json(by_alias=True, exclude_none=True)
            self._answer(200, "application/json", text.encode())
        elif path == "/healthz":
            healthy = self.server.status.healthy
            text = "ok\n" if healthy else "the agent has not looked at its ranks for a minute\n"
            self._answer(200 if healthy else 503, "text/plain; charset=utf-8", text.encode())
        else:
            self._answer(404, "text/plain; charset=utf-8", b"pages: /metrics /progress /healthz\n")

    def _answer(self, code: int, content_type: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes every few seconds are not news."""
