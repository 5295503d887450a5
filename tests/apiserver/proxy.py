"""A reverse proxy between the operator and the API server: it counts, it kills, and it tells lies that networks tell.

Watches stream through. Everything else is forwarded whole, so that a fault can strike before or after the API server
has done what was asked.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp import web

if TYPE_CHECKING:
    from tests.apiserver.server import RunningServer

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "host", "content-length", "upgrade"})


@dataclass(frozen=True)
class Seen:
    """One request. ``code`` is what the API server said (0: it was not asked); ``fault`` what was done instead."""

    at: float  # time.monotonic()
    method: str
    path: str
    query: str
    code: int
    fault: str = ""
    number: int = 0  # of the write, from 1; 0: not counted
    sent: bytes = b""

    @property
    def body(self) -> dict[str, Any]:
        """What was written (JSON, as the operator sends it)."""
        return dict(json.loads(self.sent or b"{}"))

    @property
    def is_write(self) -> bool:
        return self.method in WRITES

    @property
    def is_watch(self) -> bool:
        return "watch=true" in self.query.lower() or "watch=1" in self.query

    @property
    def resource(self) -> str:
        """``jobs``, ``finetunejobs/status``, ... of the path."""
        parts = self.path.strip("/").split("/")
        parts = parts[2 if parts[0] == "api" else 3 :]
        if parts[:1] == ["namespaces"] and len(parts) > 2:
            parts = parts[2:]
        return parts[0] + (f"/{parts[2]}" if len(parts) > 2 else "") if parts else ""


@dataclass
class Fault:
    """What happens to the requests that ``strikes`` picks, ``times`` times at most."""

    name: str
    strikes: Callable[[Seen], bool]
    code: int = 0  # answer with this instead of forwarding
    headers: dict[str, str] = field(default_factory=dict)
    drop: str = ""  # "before": the API server never hears of it; "after": it has done it, nobody is told
    hang_seconds: float = 0.0  # before anything else, or with ``drop`` "after" when it is done
    gone: bool = False  # a watch gets one ERROR event, 410
    break_seconds: float = 0.0  # a watch breaks when it has been open for so long
    times: int = 1
    struck: int = 0  # how often it did


def too_many_requests(strikes: Callable[[Seen], bool], *, retry_after: int = 1, times: int = 1) -> Fault:
    return Fault("429", strikes, code=429, headers={"Retry-After": str(retry_after)}, times=times)


def internal_error(strikes: Callable[[Seen], bool], *, times: int = 1) -> Fault:
    return Fault("500", strikes, code=500, times=times)


def gateway_timeout(strikes: Callable[[Seen], bool], *, after: bool = False, times: int = 1) -> Fault:
    """504 before the API server has heard of it, or ``after`` it has done it."""
    return Fault("504 after" if after else "504", strikes, code=504, drop="after" if after else "", times=times)


def dropped(strikes: Callable[[Seen], bool], *, after: bool = False, times: int = 1) -> Fault:
    """The connection breaks, before the API server has heard of it or ``after`` it has done it."""
    return Fault("drop after" if after else "drop", strikes, drop="after" if after else "before", times=times)


def hanging(strikes: Callable[[Seen], bool], *, seconds: float, after: bool = False, times: int = 1) -> Fault:
    """No answer for ``seconds``, before the API server has heard of it or ``after`` it has done it."""
    name = "hang after" if after else "hang"
    return Fault(name, strikes, hang_seconds=seconds, drop="after" if after else "", times=times)


def gone(strikes: Callable[[Seen], bool], *, seconds: float = 0.0, times: int = 1) -> Fault:
    """410 in a watch, after ``seconds`` in which nothing came: the resourceVersion is too old."""
    return Fault("410", strikes, gone=True, hang_seconds=seconds, times=times)


def broken(strikes: Callable[[Seen], bool], *, seconds: float, times: int = 1) -> Fault:
    """A watch breaks ``seconds`` after it was opened."""
    return Fault("break", strikes, break_seconds=seconds, times=times)


class Proxy:
    """Serves plain HTTP on loopback; the callers' own tokens are passed on."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._seen: list[Seen] = []
        self._faults: list[Fault] = []
        self._writes = 0
        self._kill: tuple[Callable[[Seen], bool], str, Callable[[], None]] | None = None
        self._killed_at = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._watches: set[asyncio.Task[object]] = set()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ---- what happened

    @property
    def seen(self) -> list[Seen]:
        with self._lock:
            return list(self._seen)

    @property
    def writes(self) -> list[Seen]:
        """Counted writes in their order. Leases are renewed by the clock and not counted."""
        return [one for one in self.seen if one.number]

    @property
    def killed(self) -> Seen | None:
        """The write at which :meth:`kill_at` struck."""
        return next((one for one in self.writes if one.number == self._killed_at), None)

    @property
    def faults(self) -> list[tuple[str, int]]:
        """What was injected, and how often it struck."""
        with self._lock:
            return [(fault.name, fault.struck) for fault in self._faults]

    # ---- what shall happen

    def inject(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def kill_at(self, strikes: Callable[[Seen], bool], kill: Callable[[], None], *, when: str = "answered") -> None:
        """Call ``kill`` once, when such a write was ``answered``, or was ``done`` but not answered."""
        with self._lock:
            self._kill = (strikes, when, kill)

    def kill_at_write(self, number: int, kill: Callable[[], None], *, when: str = "answered") -> None:
        """The same at write ``number`` from now."""
        number += self._writes
        self.kill_at(lambda seen: seen.number == number, kill, when=when)

    def break_watches(self) -> None:
        """Cut every open watch."""

        def cut() -> None:
            for task in tuple(self._watches):
                task.cancel()

        self._loop.call_soon_threadsafe(cut)

    # ---- the server

    async def _serve(self) -> None:
        context = ssl.create_default_context(cafile=str(self._server.ca_file))
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._session = session
            application = web.Application(client_max_size=16 * 1024 * 1024)
            application.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        seen = self._begin(request, body)
        fault = self._fault_for(seen)
        if fault is not None and fault.hang_seconds and fault.drop != "after":
            await self._hang(seen, fault)
        if fault is not None and fault.drop == "before":
            return self._cut(request, seen, 0, fault)
        if fault is not None and fault.gone:
            self._note(seen, 0, fault)
            return await _gone(request)
        if fault is not None and fault.code and fault.drop != "after":
            self._note(seen, 0, fault)
            return _status(fault)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        url = self._server.url + request.raw_path
        if seen.is_watch:
            async with self._session.request(request.method, _raw(url), headers=headers) as upstream:
                self._note(seen, upstream.status, fault)
                return await self._stream(request, upstream, fault.break_seconds if fault else 0.0)
        # The API server does what it was asked even if the caller is killed meanwhile: it is noted all the same.
        upstream, answer = await asyncio.shield(self._forward(request.method, url, headers, body, seen, fault))
        if fault is not None and fault.drop == "after":
            await asyncio.sleep(fault.hang_seconds)
            return _status(fault) if fault.code else self._cut(request, None, 0, fault)
        return await self._answer(request, seen, upstream, answer)

    async def _hang(self, seen: Seen, fault: Fault) -> None:
        try:
            await asyncio.sleep(fault.hang_seconds)
        except asyncio.CancelledError:
            self._note(seen, 0, fault)  # the caller gave up
            raise

    async def _forward(
        self, method: str, url: str, headers: dict[str, str], body: bytes, seen: Seen, fault: Fault | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        async with self._session.request(method, _raw(url), headers=headers, data=body or None) as upstream:
            answer = await upstream.read()
        self._note(seen, upstream.status, fault)
        return upstream, answer

    async def _answer(
        self, request: web.Request, seen: Seen, upstream: aiohttp.ClientResponse, body: bytes
    ) -> web.StreamResponse:
        kill = self._take_kill(seen)
        if kill is not None and kill[0] == "done":
            kill[1]()
        headers = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP_BY_HOP}
        response = web.Response(status=upstream.status, headers=headers, body=body)
        if kill is not None and kill[0] == "answered":
            await response.prepare(request)
            await response.write_eof()
            kill[1]()
        return response

    async def _stream(
        self, request: web.Request, upstream: aiohttp.ClientResponse, break_seconds: float
    ) -> web.StreamResponse:
        headers = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP_BY_HOP}
        response = web.StreamResponse(status=upstream.status, headers=headers)
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        end = self._loop.call_later(break_seconds, task.cancel) if break_seconds else None
        try:
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
        except (asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._watches.discard(task)
            if end is not None:
                end.cancel()
        return response

    def _cut(self, request: web.Request, seen: Seen | None, code: int, fault: Fault) -> web.StreamResponse:
        if seen is not None:
            self._note(seen, code, fault)
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=502)

    # ---- the books

    def _begin(self, request: web.Request, body: bytes) -> Seen:
        seen = Seen(time.monotonic(), request.method, request.path, request.query_string, 0, sent=body)
        if seen.is_write and seen.resource != "leases":
            with self._lock:
                self._writes += 1
                seen = replace(seen, number=self._writes)
        return seen

    def _note(self, seen: Seen, code: int, fault: Fault | None) -> None:
        name = fault.name if fault else ""
        with self._lock:
            self._seen.append(replace(seen, code=code, fault=name))

    def _fault_for(self, seen: Seen) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.strikes(seen):
                    fault.times -= 1
                    fault.struck += 1
                    return fault
        return None

    def _take_kill(self, seen: Seen) -> tuple[str, Callable[[], None]] | None:
        with self._lock:
            if self._kill is None or not seen.number or not self._kill[0](seen):
                return None
            _, when, kill = self._kill
            self._kill, self._killed_at = None, seen.number
            return when, kill


def _raw(url: str) -> object:
    from yarl import URL

    return URL(url, encoded=True)


def _status(fault: Fault) -> web.Response:
    body = {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "message": f"injected by the test: {fault.name}",
        "reason": {429: "TooManyRequests", 500: "InternalError", 504: "Timeout"}.get(fault.code, ""),
        "code": fault.code,
    }
    return web.json_response(body, status=fault.code, headers=fault.headers)


async def _gone(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    status = {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "message": "too old resource version",
        "reason": "Expired",
        "code": 410,
    }
    await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
    await response.write_eof()
    return response
