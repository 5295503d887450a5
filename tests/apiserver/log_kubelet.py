"""The part of a kubelet that serves container logs: the API server asks it, the test writes what containers say."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.apiserver.kube import Kube


@dataclass
class Log:
    """Lines of one container with their times. ``open`` while it runs; ``break_after`` cuts a stream once.

    ``broken`` cuts all streams, ``refused`` lets no new one begin.
    """

    lines: list[tuple[datetime, str]] = field(default_factory=list)
    open: bool = True
    break_after: int | None = None
    broken: bool = False
    refused: bool = False
    requests: list[dict[str, str]] = field(default_factory=list)

    def write(self, *texts: str) -> None:
        self.lines += [(datetime.now(UTC), text) for text in texts]


class LogKubelet:
    """One node whose address is ours; pods with ``nodeName`` of it have logs."""

    def __init__(self, directory: Path, node: str) -> None:
        self.node = node
        self.logs: dict[str, Log] = {}
        certificate, key = directory / "kubelet.crt", directory / "kubelet.key"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=kubelet"
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @contextmanager
    def registered(self, kube: Kube) -> Iterator[LogKubelet]:
        """A Node object says where we listen."""
        kube.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
        }
        kube.patch("Node", self.node, {"status": status}, subresource="status")
        try:
            yield self
        finally:
            kube.delete("Node", self.node)
            self._server.shutdown()
            self._server.server_close()

    def _handler(kubelet) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
                _, kind, _namespace, pod, _container = path.split("/")
                assert kind == "containerLogs"
                log = kubelet.logs[pod]
                options = {name: values[0] for name, values in query.items()}
                log.requests.append(options)
                if log.refused:
                    self._hang_up()
                    return
                self._began = False
                self._stream(log, options)

            def _stream(self, log: Log, options: dict[str, str]) -> None:
                sent = max(0, len(log.lines) - int(options["tailLines"])) if "tailLines" in options else 0
                since = datetime.fromisoformat(options.get("sinceTime", "2000-01-01T00:00:00Z"))
                while True:
                    over = not log.open or "follow" not in options
                    while sent < len(log.lines):
                        stamp, text = log.lines[sent]
                        sent += 1
                        if stamp >= since:
                            written = stamp.strftime("%Y-%m-%dT%H:%M:%S.%f000Z ") if "timestamps" in options else ""
                            self._chunk(f"{written}{text}\n".encode(errors="surrogateescape"))
                        if log.break_after == sent:
                            log.break_after = None
                            self._hang_up()
                            return
                    if log.broken:
                        self._hang_up()
                        return
                    if over:
                        self._chunk(b"")
                        return
                    time.sleep(0.02)

            def _hang_up(self) -> None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

            def _chunk(self, content: bytes) -> None:
                """With the first one go the headers: before that a kubelet says nothing at all."""
                if not self._began:
                    self._began = True
                    self.send_response(200)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
                self.wfile.flush()

            def log_message(self, format: str, *arguments: object) -> None:
                """The test reads ``requests``."""

        return Handler
