"""The cluster's Prometheus with what the product ships: its scrape configuration and its rules."""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from deploy.local.cluster.layout import PROMETHEUS, Layout
from tests.chart import ROOT, load_yaml


def ask(path: str, **parameters: str | list[str]) -> Any:
    """``data`` of an answer of Prometheus' API; AssertionError with its words if it refuses."""
    url = f"http://{PROMETHEUS}/api/v1/{path}?" + urllib.parse.urlencode(parameters, doseq=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path} {parameters}: {error.read().decode(errors='replace')}") from None


def returned_numbers(promql: str, began: float, ended: float) -> bool:
    """Whether ``promql`` was a number at any second between ``began`` and ``ended`` (unix time)."""
    found = ask("query_range", query=promql, start=f"{began:.3f}", end=f"{ended:.3f}", step="1")["result"]
    return any(text != "NaN" for series in found for _, text in series["values"])


@contextlib.contextmanager
def shipped(layout: Layout, extra_rules: dict[str, Any]) -> Iterator[None]:
    """deploy/prometheus/scrape.yaml and rules.yaml (and ``extra_rules``) are loaded, until the end."""
    file = layout.state / "prometheus" / "prometheus.json"
    before = json.loads(file.read_text())
    added = load_yaml((ROOT / "deploy/prometheus/scrape.yaml").read_text(encoding="utf-8"))["scrape_configs"]
    names = [entry["job_name"] for entry in added]  # a run that was killed may have left them
    before["scrape_configs"] = [entry for entry in before["scrape_configs"] if entry["job_name"] not in names]
    pods = next(entry for entry in before["scrape_configs"] if entry["job_name"] == "pods")
    access = {name: pods["kubernetes_sd_configs"][0][name] for name in ("api_server", "tls_config")}
    for entry in added:
        entry["kubernetes_sd_configs"] = [discovery | access for discovery in entry["kubernetes_sd_configs"]]
    after = before | {"scrape_configs": before["scrape_configs"] + added}
    rules = [layout.prometheus_rules / name for name in ("shipped.yaml", "extra.json")]
    shutil.copy(ROOT / "deploy/prometheus/rules.yaml", rules[0])
    rules[1].write_text(json.dumps(extra_rules))
    file.write_text(json.dumps(after, indent=1))
    try:
        _reload()
        yield
    finally:
        for path in rules:
            path.unlink()
        file.write_text(json.dumps(before, indent=1))
        _reload()


def _reload() -> None:
    """Raises AssertionError with what Prometheus finds wrong."""
    request = urllib.request.Request(f"http://{PROMETHEUS}/-/reload", method="POST")
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"Prometheus refuses its files: {error.read().decode(errors='replace')}") from None
