"""A model hub on this machine, as far as huggingface_hub asks: which commit, which files, their bytes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "org/base"
_RESOLVE = re.compile(rf"/api/models/{NAME}(/revision/[^/]+)?")
_TREE = re.compile(rf"/api/models/{NAME}/tree/([0-9a-f]{{40}})")
_FILE = re.compile(rf"/{NAME}/resolve/([0-9a-f]{{40}})/(.+)")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Hub:
    """One repository. ``trouble`` is what every request (or only the question for the commit) is answered instead."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.main = ""
        self.requests: list[str] = []  # paths
        self.tokens: dict[str, str | None] = {}  # by path
        self.trouble: Answer | None = None
        self.trouble_with_commits: Answer | None = None
        self.which: Callable[[], str] = lambda: self.main  # what the question for the commit is answered
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(path)
                hub.tokens[path] = self.headers.get("Authorization")
                answer = hub._answer(path)
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(answer.body)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def questions(self) -> int:
        """How often somebody asked which commit the default branch is at."""
        return sum(1 for path in self.requests if _RESOLVE.fullmatch(path))

    def push(self, files: Mapping[str, bytes] | Path) -> str:
        """A new commit on the default branch."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir() if file.is_file()}
        text = repr((self.main, sorted(files.items())))
        self.main = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.main] = dict(files)
        return self.main

    def _answer(self, path: str) -> Answer:
        if self.trouble:
            return self.trouble
        if _RESOLVE.fullmatch(path):
            return self.trouble_with_commits or _json({"id": NAME, "modelId": NAME, "sha": self.which()})
        if (found := _TREE.fullmatch(path)) and found[1] in self.commits:
            files = self.commits[found[1]].items()
            return _json([{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files])
        if (found := _FILE.fullmatch(path)) and found[1] in self.commits and found[2] in self.commits[found[1]]:
            data = self.commits[found[1]][found[2]]
            return Answer(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": found[1], "Accept-Ranges": "none"})
        return Answer(404, b"", {"X-Error-Code": "RepoNotFound"})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(content: Any) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
