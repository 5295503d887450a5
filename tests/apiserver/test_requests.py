"""The operator's own client behind a network that breaks connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import kube_config
from tests.apiserver.kube import Kube as Administrator
from tests.apiserver.proxy import Proxy, Seen, dropped, hanging

from finetune_operator import kube as operator_kube
from finetune_operator.kube import CONFIG_MAPS, ApiError, Kube
from finetune_operator.metrics import REGISTRY


@pytest.fixture
def proxy(kube: Administrator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(kube.server) as running:
        path = kube.server.write_kubeconfig(tmp_path / "through-proxy", url=running.url)
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))  # $KUBECONFIG at its import
        yield running


def ask(question: Callable[[Kube], Awaitable[Any]]) -> Any:
    async def asked() -> Any:
        client = await Kube.connect()
        try:
            return await question(client)
        finally:
            await client.close()

    return asyncio.run(asked())


def _config_map(namespace: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": namespace, "name": "a"}, "data": data}


def _writes(seen: Seen) -> bool:
    return seen.is_write


def test_a_request_is_sent_again_when_its_connection_breaks(kube: Administrator, proxy: Proxy) -> None:
    proxy.inject(dropped(_writes, times=2))
    made = ask(lambda client: client.ensure(_config_map(kube.namespace, told="once")))
    assert made["data"] == kube.get("ConfigMap", "a")["data"] == {"told": "once"}
    assert [one.fault for one in proxy.writes] == ["drop", "drop", ""]


def test_what_was_done_though_the_answer_was_lost_is_found_done(kube: Administrator, proxy: Proxy) -> None:
    proxy.inject(dropped(_writes, after=True))
    ask(lambda client: client.ensure(_config_map(kube.namespace, told="once")))
    assert [(one.method, one.code) for one in proxy.writes] == [("POST", 201), ("POST", 409), ("PATCH", 200)]
    proxy.inject(dropped(_writes, after=True))
    uid = kube.get("ConfigMap", "a")["metadata"]["uid"]
    ask(lambda client: client.delete(CONFIG_MAPS, kube.namespace, "a", uid))
    assert kube.find("ConfigMap", "a") is None


def test_a_connection_that_always_breaks_is_an_error_that_says_so(kube: Administrator, proxy: Proxy) -> None:
    proxy.inject(dropped(_writes, times=3))
    with pytest.raises(ApiError, match="the API server did not answer") as caught:
        ask(lambda client: client.create(CONFIG_MAPS, _config_map(kube.namespace)))
    assert (caught.value.status, caught.value.retriable, len(proxy.writes)) == (0, True, 3)


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server whose queue of connections is full: packets to it are swallowed, as by a network in trouble."""
    with contextlib.ExitStack() as held:
        server = held.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        path = tmp_path / "unreachable"
        context = {"name": "it", "context": {"cluster": "it", "user": "it"}}
        clusters = [{"name": "it", "cluster": {"server": url}}]
        users = [{"name": "it", "user": {"token": "none"}}]
        path.write_text(
            json.dumps({"current-context": "it", "contexts": [context], "clusters": clusters, "users": users})
        )
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield


def test_a_connection_that_is_never_made_is_tried_three_times_within_the_limit_of_one_answer(
    unreachable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 3 * operator_kube.CONNECT_SECONDS < operator_kube.REQUEST_SECONDS
    monkeypatch.setattr(operator_kube, "CONNECT_SECONDS", 0.5)
    unanswered = {"verb": "get", "resource": "configmaps", "code": "none"}
    before = REGISTRY.get_sample_value("finetune_operator_api_requests_total", unanswered) or 0
    with pytest.raises(ApiError, match=r"did not answer \(ConnectionTimeoutError: ") as caught:
        ask(lambda client: client.get(CONFIG_MAPS, "default", "a"))
    assert caught.value.retriable
    assert REGISTRY.get_sample_value("finetune_operator_api_requests_total", unanswered) == before + 3


@pytest.mark.parametrize("after", [False, True])
def test_an_answer_that_never_comes_is_an_error_that_says_so(
    kube: Administrator, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(operator_kube, "REQUEST_SECONDS", 5.0)
    proxy.inject(hanging(_writes, seconds=60, after=after))
    began = time.monotonic()
    with pytest.raises(ApiError, match="the API server did not answer") as caught:
        ask(lambda client: client.create(CONFIG_MAPS, _config_map(kube.namespace)))
    assert time.monotonic() - began < 45
    assert (caught.value.status, caught.value.reason, caught.value.retriable) == (0, "Unreachable", True)
    kube.wait(lambda: proxy.writes, "the proxy has noted that the caller gave up")
    assert len(proxy.writes) == 1, "it may have been done: the next look asks anew"
    assert (kube.find("ConfigMap", "a") is not None) is after
