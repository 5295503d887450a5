"""The proxy of the crash tests forwards everything, counts writes, and does each of its tricks."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import urllib3
from tests.apiserver.kube import Kube, Unreachable, wait
from tests.apiserver.proxy import (
    Proxy,
    Seen,
    broken,
    dropped,
    gateway_timeout,
    gone,
    hanging,
    internal_error,
    too_many_requests,
)


@pytest.fixture
def proxy(kube: Kube):  # type: ignore[no-untyped-def]
    with Proxy(kube.server) as running:
        yield running


@pytest.fixture
def through(kube: Kube, proxy: Proxy):  # type: ignore[no-untyped-def]
    server = dataclasses.replace(kube.server, url=proxy.url)
    with Kube(server, namespace=kube.namespace) as client:
        yield client


def _config_map(name: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}


def _write(seen: Seen) -> bool:
    return seen.is_write


def test_requests_are_forwarded_and_writes_are_counted(kube: Kube, proxy: Proxy, through: Kube) -> None:
    through.create(_config_map("a"))
    through.apply(_config_map("b"))
    assert [item["metadata"]["name"] for item in through.list("ConfigMap")] == ["a", "b"]
    through.delete("ConfigMap", "a")
    assert [(one.method, one.resource, one.code, one.number) for one in proxy.writes] == [
        ("POST", "configmaps", 201, 1),
        ("PATCH", "configmaps", 201, 2),
        ("DELETE", "configmaps", 200, 3),
    ]
    assert [one["metadata"]["name"] for one in kube.list("ConfigMap")] == ["b"]


def test_renewals_of_a_lease_are_not_counted(proxy: Proxy, through: Kube) -> None:
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "l"}, "spec": {}}
    through.create(lease)
    assert ([one.resource for one in proxy.seen], proxy.writes) == (["leases"], [])


def test_a_watch_streams_through_and_can_be_cut(kube: Kube, proxy: Proxy, through: Kube) -> None:
    events: list[str] = []
    ended = threading.Event()

    def watch() -> None:
        try:
            for event in through.watch("ConfigMap"):
                events.append(event["object"]["metadata"]["name"])
        except Exception:
            pass
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    wait(lambda: any(one.is_watch for one in proxy.seen), "the watch is open")
    kube.create(_config_map("a"))
    wait(lambda: events == ["a"], "the event has come through")
    proxy.break_watches()
    assert ended.wait(60)


def test_an_expired_watch_is_told_410(proxy: Proxy, through: Kube) -> None:
    proxy.inject(gone(lambda seen: seen.is_watch))
    assert [(event["type"], event["object"]["code"]) for event in through.watch("ConfigMap")] == [("ERROR", 410)]


def test_a_watch_breaks_when_its_time_is_over(proxy: Proxy, through: Kube) -> None:
    proxy.inject(broken(lambda seen: seen.is_watch, seconds=1.0))
    began = time.monotonic()
    with pytest.raises(urllib3.exceptions.ProtocolError):
        list(through.watch("ConfigMap"))
    assert 1.0 <= time.monotonic() - began < 60
    assert ([(one.code, one.fault) for one in proxy.seen], proxy.faults) == ([(200, "break")], [("break", 1)])


def test_an_answer_may_never_come(kube: Kube, proxy: Proxy, through: Kube) -> None:
    through.timeout_seconds = 5.0
    for number, after in enumerate((False, True)):
        proxy.inject(hanging(_write, seconds=60, after=after))
        with pytest.raises(Unreachable, match="timed out"):
            through.create(_config_map(f"c{number}"))
        kube.wait(lambda n=number: len(proxy.writes) > n, "it is noted that the caller gave up")  # type: ignore[misc]
    assert [one["metadata"]["name"] for one in kube.list("ConfigMap")] == ["c1"]
    assert [(one.code, one.fault) for one in proxy.writes] == [(0, "hang"), (201, "hang after")]
    assert proxy.faults == [("hang", 1), ("hang after", 1)]


def test_errors_are_answered_without_asking_the_server(kube: Kube, proxy: Proxy, through: Kube) -> None:
    for fault, code in ((too_many_requests, 429), (internal_error, 500), (gateway_timeout, 504)):
        proxy.inject(fault(_write))
        answer = through.call("POST", through.path("ConfigMap"), _config_map("a"))
        assert (answer.code, answer.body["message"].startswith("injected by the test")) == (code, True)
    assert kube.list("ConfigMap") == []
    through.create(_config_map("a"))


def test_an_answer_can_be_lost_after_the_deed(kube: Kube, proxy: Proxy, through: Kube) -> None:
    proxy.inject(gateway_timeout(_write, after=True))
    assert through.call("POST", through.path("ConfigMap"), _config_map("a")).code == 504
    proxy.inject(dropped(_write, after=True))
    with pytest.raises(Unreachable):
        through.create(_config_map("b"))
    proxy.inject(dropped(_write))
    with pytest.raises(Unreachable):
        through.create(_config_map("c"))
    assert [one["metadata"]["name"] for one in kube.list("ConfigMap")] == ["a", "b"]
    assert [(one.code, one.fault) for one in proxy.writes] == [(201, "504 after"), (201, "drop after"), (0, "drop")]


@pytest.mark.parametrize("when", ["answered", "done"])
def test_it_strikes_at_the_write_it_was_told(kube: Kube, proxy: Proxy, through: Kube, when: str) -> None:
    struck: list[float] = []
    through.create(_config_map("a"))
    proxy.kill_at_write(2, lambda: struck.append(time.monotonic()), when=when)
    through.create(_config_map("b"))
    assert struck == []
    through.create(_config_map("c"))
    answered = time.monotonic()
    wait(lambda: struck, "it has struck")
    through.create(_config_map("d"))
    assert len(struck) == 1
    assert when == "answered" or struck[0] < answered
