"""The chart as tests use it: rendered by a real Helm, read as dicts; and every Prometheus expression that it ships."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tests.tiers import cannot_run

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts/finetune-operator"
RELEASE, NAMESPACE = "finetune-operator", "finetune-system"
MONITORING = "monitoring.coreos.com/v1"

Document = dict[str, Any]


def load_yaml(text: str) -> Any:
    """One YAML document."""
    return YAML(typ="safe").load(text)


def tool(name: str) -> str:
    """The path of helm or promtool; fails in CI, skips loudly elsewhere, where there is none and Go cannot build it."""
    from deploy.local.cluster.layout import ClusterError
    from deploy.local.cluster.tools import program

    try:
        return str(program(name))
    except ClusterError as error:
        cannot_run("chart", error)


def helm(*arguments: str, values: Document | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Helm; ``values`` go in as a values file."""
    command = [tool("helm"), *arguments, *(("--values", "-") if values else ())]
    text = json.dumps(values) if values else None
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    if check and done.returncode:
        raise AssertionError(f"helm {' '.join(arguments)}: {done.stderr}")
    return done


def render(
    values: Document | None = None, *arguments: str, namespace: str = NAMESPACE, release: str = RELEASE
) -> list[Document]:
    """Every object of the release, the test pod too."""
    text = _rendered(json.dumps(values or {}), namespace, release, arguments)
    return [document for document in YAML(typ="safe").load_all(text) if document]


@cache
def _rendered(values: str, namespace: str, release: str, arguments: tuple[str, ...]) -> str:
    command = ("template", release, str(CHART), "--namespace", namespace, *arguments)
    return helm(*command, values=json.loads(values)).stdout


def refusal(values: Document) -> str:
    """What Helm says when it refuses ``values``."""
    done = helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values, check=False)
    assert done.returncode != 0, "Helm accepted these values."
    return done.stderr


def one(documents: list[Document], kind: str, name: str = "") -> Document:
    """The only object of this kind (and name)."""
    found = [d for d in documents if d["kind"] == kind and name in ("", d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects are {kind} {name}"
    return found[0]


def settings_of(documents: list[Document], name: str = RELEASE) -> Document:
    """config.json of the operator; ``name``: the release's full name."""
    loaded: Document = json.loads(one(documents, "ConfigMap", name)["data"]["config.json"])
    return loaded


# ---- values that are rendered in every test of all renderings --------------------------------------------------------

DIGEST = "sha256:" + "ab" * 32
EVERY_SWITCH: Document = {switch: {"enabled": True} for switch in ("serviceMonitor", "podMonitor", "prometheusRule")}


def matrix(first: str, second: str) -> dict[str, Document]:
    """Ways to install the chart. ``first`` and ``second`` are namespaces that exist."""
    return {
        "defaults": {},
        "namespaces": {"namespaces": [first, second]},
        "two replicas": {"replicas": 2, "podLabels": {"team": "ml"}, "podAnnotations": {"note": "x"}},
        "no lease": {"lease": {"enabled": False}},
        "digests": {"image": {"operator": {"digest": DIGEST}, "trainer": {"digest": DIGEST, "pullPolicy": "Always"}}},
        "pull secrets": {"imagePullSecrets": ["registry"], "training": {"imagePullSecrets": ["registry"]}},
        "placement": {
            "nodeSelector": {"pool": "system"},
            "tolerations": [{"key": "system", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
                {"weight": 1, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}}
            ]}},
            "topologySpreadConstraints": [{
                "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/component": "operator"}},
            }],
            "environment": {"HTTPS_PROXY": "http://proxy:3128"},
            "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1Gi"}},
        },
        "network policies": {
            "networkPolicy": {
                "enabled": True,
                "metricsFrom": ["monitoring"],
                "apiServer": {"ports": [6443], "cidrs": ["10.0.0.1/32"]},
            },
            "trainingNetworkPolicy": {"enabled": True, "namespaces": [first, second], "metricsFrom": ["monitoring"]},
        },
        "open network policies": {
            "namespaces": [first], "networkPolicy": {"enabled": True},
            "trainingNetworkPolicy": {"enabled": True, "blockedCidrs": []},
        },
        "monitoring": {"monitoring": {**EVERY_SWITCH, "dashboard": {"enabled": True, "annotations": {"folder": "ML"}}}},
        "own accounts": {
            "serviceAccount": {"create": False, "name": "mine"}, "rbac": {"create": False, "userRoles": False},
        },
        "other names": {"fullnameOverride": "trainer", "crds": {"annotations": {"note": "x"}}},
        "without crd": {"crds": {"install": False}, "podDisruptionBudget": {"enabled": True}},
    }  # fmt: skip


# ---- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """One PromQL expression of the dashboard (``returns data`` for a live job) or of an alert (only while it fires)."""

    source: str  # "dashboard" or "alert"
    name: str  # panel's title and legend, or the alert's name
    promql: str

    @property
    def selectors(self) -> list[str]:
        """The vector selectors in it, without ranges: what must exist for it ever to return data."""
        return re.findall(r"\bfinetune_(?!(?:job|node)\b)\w+(?:\{[^}]*\})?", self.promql)


def all_expressions(namespace: str, job: str, interval: str = "1m") -> list[Expression]:
    """Every expression that the chart ships; the dashboard's variables are replaced by the arguments."""
    dashboard = json.loads((CHART / "files/dashboard.json").read_text(encoding="utf-8"))
    variables = {"$namespace": namespace, "$job": job, "$__rate_interval": interval}
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            promql = re.sub(r"\$\w+", lambda match: variables[match.group()], target["expr"])
            found.append(Expression("dashboard", f"{panel['title']}: {target['legendFormat']}", promql))
    found += [Expression("alert", rule["alert"], rule["expr"]) for rule in alert_rules()]
    return found


def alert_rules() -> Iterator[Document]:
    """The alerts, as Prometheus reads them."""
    for group in load_yaml((CHART / "files/rules.yaml").read_text(encoding="utf-8"))["groups"]:
        yield from group["rules"]
