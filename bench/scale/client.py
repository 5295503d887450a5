"""A bare asynchronous client: it creates objects as fast as the API server takes them, and watches with a clock."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from tests.apiserver.server import RunningServer

AT_ONCE = 32
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_LIST_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
T = TypeVar("T")


@dataclass(frozen=True)
class Post:
    """One object to create, serialised before any clock runs."""

    path: str
    body: bytes

    @classmethod
    def of(cls, path: str, manifest: dict[str, Any]) -> Post:
        return cls(path, json.dumps(manifest, separators=(",", ":")).encode())


@dataclass
class Seen:
    """Names of the objects that a watch has shown, with the time of their first event (time.monotonic())."""

    first: dict[str, float] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    async def wait_for(self, count: int, seconds: float, what: str) -> float:
        """Until ``count`` names were seen; the time of the last one."""
        deadline = time.monotonic() + seconds
        while len(self.first) < count:
            if self.error is not None:
                raise self.error
            self.news.clear()
            left = deadline - time.monotonic()
            try:
                await asyncio.wait_for(self.news.wait(), max(0.0, left))
            except TimeoutError:
                raise TimeoutError(f"{len(self.first):,} of {count:,} {what} after {seconds:g} s.") from None
        return max(self.first.values())


class Bare:
    """An administrator with ``AT_ONCE`` connections and no opinions."""

    def __init__(self, server: RunningServer) -> None:
        self._url = server.url
        context = ssl.create_default_context(cafile=str(server.ca_file))
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            headers={"Authorization": f"Bearer {server.token}"},
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def __aenter__(self) -> Bare:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, post: Post, method: str = "POST", content_type: str = "application/json") -> dict[str, Any]:
        headers = {"Content-Type": content_type}
        async with self._session.request(method, self._url + post.path, data=post.body, headers=headers) as response:
            text = await response.read()
            if response.status >= 300:
                raise RuntimeError(f"{method} {post.path} was answered with {response.status}: {text[:300]!r}.")
            return dict(json.loads(text))

    async def get(self, path: str) -> dict[str, Any]:
        async with self._session.get(self._url + path) as response:
            response.raise_for_status()
            return dict(await response.json())

    async def create_all(self, groups: Sequence[Sequence[Post]]) -> list[float]:
        """Every group in order, ``AT_ONCE`` groups at once; when the last object of each existed."""

        async def create(group: Sequence[Post]) -> float:
            for post in group:
                await self.send(post)
            return time.monotonic()

        return await each([lambda g=group: create(g) for group in groups])

    @asynccontextmanager
    async def watching(self, path: str, fields: str = "") -> AsyncIterator[Seen]:
        """Names under ``path`` from now on, and when they were first seen."""
        listing = await self._session.get(
            self._url + path, params={"limit": "1"}, headers={"Accept": _LIST_METADATA_ONLY}
        )
        version = (await listing.json())["metadata"]["resourceVersion"]
        seen = Seen()
        query = {"watch": "true", "resourceVersion": version, "fieldSelector": fields}
        task = asyncio.create_task(self._watch(path, query, seen))
        try:
            yield seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self, path: str, query: dict[str, str], seen: Seen) -> None:
        """Follow until cancelled; the API server closes the watches of slow readers on a machine that is too busy."""
        try:
            while True:
                query["resourceVersion"] = await self._follow(path, query, seen)
        except Exception as error:
            seen.error = error
            seen.news.set()

    async def _follow(self, path: str, query: dict[str, str], seen: Seen) -> str:
        """One connection's events; the resource version to go on from."""
        version = query["resourceVersion"]
        async with self._session.get(
            self._url + path, params=query, headers={"Accept": _METADATA_ONLY}, read_bufsize=2**22
        ) as response:
            response.raise_for_status()
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise RuntimeError(f"The watch of {path} was refused: {event['object']}.")
                metadata = event["object"]["metadata"]
                version = metadata["resourceVersion"]
                if event["type"] == "ADDED":
                    seen.first.setdefault(metadata["name"], time.monotonic())
                    seen.news.set()
        return version


async def each(work: Iterable[Callable[[], Awaitable[T]]], at_once: int = AT_ONCE) -> list[T]:
    """The results of all calls in their order, ``at_once`` at a time; the first failure ends it."""
    limit = asyncio.Semaphore(at_once)

    async def limited(call: Callable[[], Awaitable[T]]) -> T:
        async with limit:
            return await call()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(limited(call)) for call in work]
    return [task.result() for task in tasks]
