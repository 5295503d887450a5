"""Pages of progress over real TCP, and which words of the cluster still count."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from tests.unit.operator.job_life import SETTINGS, START, Life, at, job, page, pod, text

from finetune_operator import gather
from finetune_operator.gather import Gatherer, complaints_count_since
from finetune_operator.kube import Kube

RESOURCE = {"metadata": {"namespace": "ns", "name": "bot", "uid": "u"}, "spec": {}}


def pages(bodies: list[bytes], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The node ranks of the pages that count, where pod i answers with ``bodies[i]``, one packet per 1,000 bytes."""

    async def serve(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = bodies[number]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 1000):
            writer.write(body[start : start + 1000])
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.close()

    async def pulled() -> list[int]:
        servers, port = [], 0
        for number in range(len(bodies)):
            address = f"127.9.8.{number + 1}"
            handler = lambda reader, writer, number=number: serve(number, reader, writer)  # noqa: E731
            servers.append(await asyncio.start_server(handler, address, port))
            port = servers[0].sockets[0].getsockname()[1]
        monkeypatch.setattr(gather, "METRICS_PORT", port)
        patient = SETTINGS.progress.model_copy(update={"timeout_seconds": 60})
        gatherer = Gatherer(Kube(ApiClient(Configuration())), SETTINGS.model_copy(update={"progress": patient}))
        pods = tuple(pod(number, address=f"127.9.8.{number + 1}") for number in range(len(bodies)))
        found = await gatherer._progress(RESOURCE, pods)
        await gatherer.close()
        for server in servers:
            server.close()
        return [one.node_rank for one in found]

    return asyncio.run(pulled())


def test_a_page_that_comes_in_many_packets_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    long = page(0).model_copy(update={"message": "x" * 30_000}).model_dump_json(by_alias=True).encode()
    assert len(long) > 30_000
    assert pages([long], monkeypatch) == [0]


def test_pages_of_other_jobs_and_cut_pages_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, cut = (page(number).model_dump_json(by_alias=True).encode() for number in (0, 1))
    other = page(2).model_copy(update={"job": {"namespace": "ns", "name": "bot", "uid": "earlier"}})
    nobodys = page(3).model_copy(update={"job": {}})
    told = [other.model_dump_json(by_alias=True).encode(), nobodys.model_dump_json(by_alias=True).encode()]
    assert pages([ours, cut[:-5], *told], monkeypatch) == [0]


def test_a_pod_that_is_asked_to_go_is_not_waited_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network may be gone already, and its last words are next."""

    async def asked() -> tuple[object, ...]:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()  # until the caller gives up
            writer.close()

        server = await asyncio.start_server(silent, "127.9.10.1", 0)
        monkeypatch.setattr(gather, "METRICS_PORT", server.sockets[0].getsockname()[1])
        patient = SETTINGS.progress.model_copy(update={"timeout_seconds": 3600})
        gatherer = Gatherer(Kube(ApiClient(Configuration())), SETTINGS.model_copy(update={"progress": patient}))
        leaving = (pod(0, address="127.9.10.1", asked_to_go=at(10)),)
        found = await asyncio.wait_for(gatherer._progress(RESOURCE, leaving), 60)
        await gatherer.close()
        server.close()
        return found

    assert asyncio.run(asked()) == ()


def test_a_pod_sends_the_operator_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    async def redirected() -> tuple[object, ...]:
        async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            body = page(0).model_dump_json(by_alias=True).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            writer.close()

        async def sends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            target = b"http://127.9.9.2:%d/metadata" % other.sockets[0].getsockname()[1]
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % target)
            writer.close()

        other = await asyncio.start_server(elsewhere, "127.9.9.2", 0)
        first = await asyncio.start_server(sends, "127.9.9.1", 0)
        monkeypatch.setattr(gather, "METRICS_PORT", first.sockets[0].getsockname()[1])
        gatherer = Gatherer(Kube(ApiClient(Configuration())), SETTINGS)
        found = await gatherer._progress(RESOURCE, (pod(0, address="127.9.9.1"),))
        await gatherer.close()
        for server in (first, other):
            server.close()
        return found

    assert (asyncio.run(redirected()), asked) == ((), [])


def test_complaints_count_since_the_pods_were_asked_for_last() -> None:
    life = Life()
    slack = timedelta(seconds=30)
    assert complaints_count_since(life.resource, job()) == START - slack
    assert complaints_count_since(life.resource, job(started=at(100))) == at(100) - slack
    life.resource["status"] = {"attempts": [{"number": 1, "endedAt": text(300)}]}
    assert complaints_count_since(life.resource, job(started=at(100))) == at(300) - slack


def test_the_time_is_the_api_servers_where_the_clocks_differ() -> None:
    async def told(date: str | None) -> float:
        kube = Kube(ApiClient(Configuration()))
        before = kube.now()
        kube._note_time(date)
        return (kube.now() - before).total_seconds()

    assert asyncio.run(told("Sat, 21 Nov 2037 10:00:00 GMT")) > 3600
    assert asyncio.run(told("nonsense")) < 60
    assert asyncio.run(told(None)) < 60
