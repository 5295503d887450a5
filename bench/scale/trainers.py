"""What the fake pods answer: one page of progress at every pod address, as a launcher serves it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from finetune_api.report import Heartbeat, Phase, Progress
from finetune_operator.gather import METRICS_PORT


@asynccontextmanager
async def trainers() -> AsyncIterator[None]:
    """Serve until left. The page never changes: what is measured is looking, not training."""
    now = time.time()
    beat = Heartbeat(
        rank=0,
        local_rank=0,
        pid=1,
        phase=Phase.TRAINING,
        step=10,
        total_steps=1000,
        loss=1.25,
        step_seconds=2.0,
        updated_at=now,
    )
    page = Progress(
        job={},
        node_rank=0,
        pid=1,
        phase=Phase.TRAINING,
        attempt=1,
        gang="scale",
        attempt_started_at=now,
        ranks=(beat,),
        started_at=now,
    )
    body = page.model_dump_json(by_alias=True).encode()

    async def answer(_request: web.Request) -> web.Response:
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
