"""/metrics on one port; /healthz and /readyz on another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from finetune_operator.metrics import REGISTRY

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Pages:
    """Serves until closed. ``trouble`` says why the operator is not ready, ``stuck`` why it must restart, or nothing.

    Both are asked on the event loop that all work is done on: one that hangs answers neither.
    """

    def __init__(self, trouble: Callable[[], str], stuck: Callable[[], str] = str) -> None:
        self._trouble = trouble
        self._stuck = stuck
        self._runners: list[web.AppRunner] = []

    async def serve(self, metrics_port: int, health_port: int) -> tuple[int, int]:
        """Start both servers on every address; the ports really open."""
        health: dict[str, _Handler] = {"/healthz": self._healthz, "/readyz": self._readyz}
        return await self._start(metrics_port, {"/metrics": _metrics}), await self._start(health_port, health)

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _start(self, port: int, pages: dict[str, _Handler]) -> int:
        application = web.Application()
        for path, handler in pages.items():
            application.router.add_get(path, handler)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, None, port).start()
        return int(runner.addresses[0][1])

    async def _healthz(self, _request: web.Request) -> web.Response:
        return _page(self._stuck())

    async def _readyz(self, _request: web.Request) -> web.Response:
        return _page(self._trouble())


def _page(trouble: str) -> web.Response:
    return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)


async def _metrics(request: web.Request) -> web.Response:
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(REGISTRY), headers={"Content-Type": content_type})
