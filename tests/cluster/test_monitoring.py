"""Prometheus with the files that we ship: it finds operator and trainer, and every expression is a number."""

from __future__ import annotations

import subprocess

import pytest
from deploy.local.cluster import tools
from tests.chart import ROOT, Expression, all_expressions
from tests.cluster.cluster import LocalCluster, wait_for
from tests.cluster.live_monitoring import ask, returned_numbers
from tests.cluster.lives import Lives, lived
from tests.cluster.workshop import RELEASE, SYSTEM, helm

# Vendors' datasheets name the peak of their accelerators; nobody knows that of these CPUs.
NEEDS_AN_ACCELERATOR = {"finetune_model_flops_utilization"}


@pytest.fixture(scope="module")
def lives(product: LocalCluster) -> Lives:
    return lived(product)


def test_prometheus_finds_operator_and_trainer_by_the_scrape_configuration_that_we_ship(lives: Lives) -> None:
    found = {
        (target["scrapePool"], target["labels"]["namespace"], target["labels"].get("finetune_node")): target
        for target in lives.targets
        if target["labels"].get("namespace") in {SYSTEM, lives.namespace} and target["labels"]["job"] != "pods"
    }
    training = {("finetune-trainer", lives.namespace, "0"), ("finetune-trainer", lives.namespace, "1")}
    assert {("finetune-operator", SYSTEM, None), *training} <= set(found)
    ours = [target for target in found.values() if target["labels"].get("finetune_job") in {None, "whole"}]
    assert [(target["health"], target["lastError"]) for target in ours] == [("up", "")] * len(ours)


class TestExpressions:
    @pytest.mark.parametrize("name", [found.name for found in all_expressions("", "") if found.source == "dashboard"])
    def test_the_panel_shows_numbers(self, lives: Lives, name: str) -> None:
        expression = expression_of(lives, name)
        if any(series in expression.promql for series in NEEDS_AN_ACCELERATOR):
            assert not returned_numbers(expression.promql, lives.began, lives.ended), "take it off the exceptions"
        else:
            assert returned_numbers(expression.promql, lives.began, lives.ended), expression.promql

    @pytest.mark.parametrize("name", [found.name for found in all_expressions("", "") if found.source == "alert"])
    def test_the_alert_or_all_that_it_reads_are_numbers(self, lives: Lives, name: str) -> None:
        expression = expression_of(lives, name)
        assert expression.selectors
        if not returned_numbers(expression.promql, lives.began, lives.ended):
            for selector in expression.selectors:
                assert exists(selector, lives), selector

    @pytest.mark.parametrize(("label", "series"), [("namespace", "finetune_phase"), ("finetune_job", None)])
    def test_the_variables_of_the_dashboard_offer_the_job(self, lives: Lives, label: str, series: str | None) -> None:
        selector = series or f'finetune_phase{{namespace="{lives.namespace}"}}'
        times = {"start": f"{lives.began:.0f}", "end": f"{lives.ended:.0f}"}
        values = ask(f"label/{label}/values", **{"match[]": selector}, **times)
        assert {"namespace": {lives.namespace}, "finetune_job": {"whole"}}[label] <= set(values)


def expression_of(lives: Lives, name: str) -> Expression:
    return next(found for found in all_expressions(lives.namespace, "whole") if found.name == name)


def exists(selector: str, lives: Lives) -> bool:
    """Whether the series is there. Values of labels that mean trouble may never have been seen; the labels must."""
    if returned_numbers(selector, lives.began, lives.ended):
        return True
    name, _, matchers = selector.partition("{")
    labels = [matcher.split("=")[0].rstrip("!") for matcher in matchers.rstrip("}").split(",")]
    present = ",".join(f'{label}!=""' for label in labels)
    return bool(matchers) and returned_numbers(f"{name}{{{present}}}", lives.began, lives.ended)


class TestRules:
    def test_promtool_finds_nothing_wrong(self) -> None:
        command = [str(tools.program("promtool")), "check", "rules", str(ROOT / "deploy/prometheus/rules.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_prometheus_evaluates_every_alert_that_we_ship(self, lives: Lives) -> None:
        evaluated = {rule["name"]: (rule["health"], rule.get("lastError", "")) for rule in lives.rules}
        shipped = [found.name for found in all_expressions("", "") if found.source == "alert"]
        assert {name: evaluated.get(name) for name in shipped} == dict.fromkeys(shipped, ("ok", ""))

    def test_a_failed_job_raises_its_alert(self, lives: Lives) -> None:
        assert returned_numbers('ALERTS{alertname="FineTuneJobFailed",alertstate="firing"}', lives.began, lives.ended)


class TestDeletedJobs:
    def test_the_operator_names_no_job(self, lives: Lives) -> None:
        assert "finetune_operator_jobs{" in lives.metrics
        lines = [line for line in lives.metrics.splitlines() if any(word in line for word in _names(lives))]
        assert lines == []

    def test_series_of_deleted_jobs_vanish(self, lives: Lives, product: LocalCluster) -> None:
        selector = f'{{__name__=~"finetune_.+",namespace="{lives.namespace}"}}'
        assert returned_numbers(f"count({selector})", lives.began, lives.ended)
        wait_for(lambda: not product.query(selector), 30, f"there are still {product.query(selector)[:3]}")


def _names(lives: Lives) -> tuple[str, ...]:
    return (lives.namespace, '"whole"', '"refused"', '"unclear"', '"idle"', "ftj-")


def test_helm_test_passes(product: LocalCluster) -> None:
    assert "Phase:          Succeeded" in helm(product, "test", RELEASE, "--namespace", SYSTEM, "--timeout", "120s")
