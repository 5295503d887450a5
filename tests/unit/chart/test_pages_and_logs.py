"""What the chart's probes ask, and what docs/monitoring.md says of log lines and of a leader's series."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from collections.abc import Iterator

import aiohttp
import pytest
from tests.chart import ROOT, one, render

from finetune_operator.logs import log_of, set_up
from finetune_operator.metrics import REGISTRY, give_up_lead, take_lead
from finetune_operator.pages import Pages
from finetune_operator.settings import LogFormat, LogSettings

JOB = {"metadata": {"namespace": "team-a", "name": "bot", "uid": "1-2-3"}}


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Whatever a test sets up is gone after it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("own_logging")
def test_a_line_about_a_job_has_its_namespace_name_and_uid_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogSettings(format=LogFormat.JSON))
    log_of(JOB).info("it runs")
    logging.getLogger("finetune_operator").warning("refused", extra={"namespace": "team-a", "job": "bot", "uid": ""})
    logging.getLogger("finetune_operator.lease").info("standing by")
    of_job, refused, of_nobody = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    del of_job["time"], refused["time"], of_nobody["time"]
    about = {"namespace": "team-a", "name": "bot", "logger": "finetune_operator"}
    assert of_job == {**about, "level": "INFO", "message": "it runs", "uid": "1-2-3"}
    assert refused == {**about, "level": "WARNING", "message": "refused", "uid": ""}
    assert of_nobody == {"level": "INFO", "message": "standing by", "logger": "finetune_operator.lease"}
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8").partition("## Logs\n")[2].partition("\n## ")[0]
    assert {"time", *of_job} <= set(re.findall(r"`(\w+)`", page))


@pytest.mark.usefixtures("own_logging")
def test_as_text_the_job_stands_at_the_end_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogSettings(format=LogFormat.TEXT))
    log_of(JOB).info("it runs")
    logging.getLogger("x").info("gone", extra={"namespace": "team-a", "job": "bot", "uid": ""})
    logging.getLogger("x").info("standing by")
    of_job, without_uid, of_nobody = capsys.readouterr().err.splitlines()
    assert of_job.endswith(" INFO    it runs [team-a/bot 1-2-3]")
    assert without_uid.endswith(" INFO    gone [team-a/bot]")
    assert of_nobody.endswith(" INFO    standing by")


def watched() -> dict[str, float]:
    """What a scrape finds: watched namespace -> value."""
    families = (family for family in REGISTRY.collect() if family.name == "finetune_operator_watches")
    return {sample.labels["watched_namespace"]: sample.value for family in families for sample in family.samples}


@pytest.mark.parametrize(
    ("namespaces", "series"), [((), {"*": 1.0}), (("team-a", "team-b"), {"team-a": 1.0, "team-b": 1.0})]
)
def test_a_leader_says_what_it_watches_and_one_that_stands_by_says_nothing(
    namespaces: tuple[str, ...], series: dict[str, float]
) -> None:
    give_up_lead()
    assert (watched(), REGISTRY.get_sample_value("finetune_operator_leader")) == ({}, 0.0)
    take_lead(namespaces)
    assert (watched(), REGISTRY.get_sample_value("finetune_operator_leader")) == (series, 1.0)
    give_up_lead()
    assert (watched(), REGISTRY.get_sample_value("finetune_operator_leader")) == ({}, 0.0)


def test_the_probes_of_the_chart_are_told_why_and_again_when_all_is_well() -> None:
    container = one(render(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    alive, ready = (container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("liveness", "readiness"))
    assert container["startupProbe"]["httpGet"]["path"] == alive
    said = {"ready": "", "alive": ""}

    async def ask() -> list[tuple[str, str, int, str]]:
        pages = Pages(lambda: said["ready"], lambda: said["alive"])
        with socket.socket() as free:  # one port for every address: with 0 each family of addresses gets another
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        await pages.serve(0, port)
        answers = []
        async with aiohttp.ClientSession() as session:
            for said["ready"], said["alive"] in (("", ""), ("no CRD", ""), ("", "no watch"), ("", "")):
                for path in (alive, ready):
                    async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                        answers.append((said["ready"] + said["alive"], path, answer.status, await answer.text()))
        await pages.close()
        return answers

    well = [("", "/healthz", 200, "ok\n"), ("", "/readyz", 200, "ok\n")]
    assert asyncio.run(ask()) == [
        *well,
        ("no CRD", "/healthz", 200, "ok\n"),
        ("no CRD", "/readyz", 503, "no CRD\n"),
        ("no watch", "/healthz", 503, "no watch\n"),
        ("no watch", "/readyz", 200, "ok\n"),
        *well,
    ]
