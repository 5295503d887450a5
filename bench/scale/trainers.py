"""What the fake pods answer: one page of progress at every pod address, as the launcher of that pod's job serves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from tests.apiserver.server import RunningServer

from bench.scale.client import Bare
from bench.scale.workload import ALL_FINETUNEJOBS, ALL_PODS
from finetune_api.report import Heartbeat, Phase, Progress
from finetune_operator.gather import METRICS_PORT
from finetune_operator.observe import JOB_LABEL

_LOOK_AGAIN_SECONDS = 5.0


class Owners:
    """Whose pod has which address: a pod knows its job's uid from its ConfigMap, we ask the API server now and then."""

    def __init__(self, bare: Bare) -> None:
        self._bare = bare
        self._known: dict[str, dict[str, str]] = {}
        self._looked = 0.0
        self._turn = asyncio.Lock()

    async def identity(self, address: str) -> dict[str, str] | None:
        """Namespace, name and uid of the FineTuneJob, or None while the pod is not known yet."""
        async with self._turn:
            if address not in self._known and time.monotonic() - self._looked > _LOOK_AGAIN_SECONDS:
                await self._look()
        return self._known.get(address)

    async def _look(self) -> None:
        jobs = (await self._bare.get(ALL_FINETUNEJOBS))["items"]
        uids = {(job["metadata"]["namespace"], job["metadata"]["name"]): job["metadata"]["uid"] for job in jobs}
        for pod in (await self._bare.get(ALL_PODS))["items"]:
            place = pod["metadata"]["namespace"], pod["metadata"].get("labels", {}).get(JOB_LABEL, "")
            if place in uids and (address := pod["status"].get("podIP")):
                self._known[address] = {"namespace": place[0], "name": place[1], "uid": uids[place]}
        self._looked = time.monotonic()


@asynccontextmanager
async def trainers(server: RunningServer) -> AsyncIterator[None]:
    """Serve until left. The page never changes: what is measured is looking, not training."""
    async with Bare(server) as bare:
        owners, now = Owners(bare), time.time()

        async def answer(request: web.Request) -> web.Response:
            assert request.transport is not None
            identity = await owners.identity(request.transport.get_extra_info("sockname")[0].removeprefix("::ffff:"))
            if identity is None:
                raise web.HTTPServiceUnavailable
            body = _page(identity, now).model_dump_json(by_alias=True).encode()
            return web.Response(body=body, content_type="application/json")

        application = web.Application()
        application.router.add_get("/progress", answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, None, METRICS_PORT).start()
        try:
            yield
        finally:
            await runner.cleanup()


def _page(identity: dict[str, str], started: float) -> Progress:
    beat = Heartbeat(
        rank=0,
        local_rank=0,
        pid=1,
        phase=Phase.TRAINING,
        step=10,
        total_steps=1000,
        loss=1.25,
        step_seconds=2.0,
        updated_at=started,
    )
    return Progress(
        job=identity,
        node_rank=0,
        pid=1,
        phase=Phase.TRAINING,
        attempt=1,
        gang="scale",
        attempt_started_at=started,
        ranks=(beat,),
        started_at=started,
    )
