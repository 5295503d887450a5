"""Prometheus Operator's own CRDs, from its Go module: the API server then judges our monitors and rules for real."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import tempfile
from pathlib import Path

from tests.apiserver.kube import Document, Kube
from tests.chart import load_yaml

MODULE = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
KINDS = ("servicemonitors", "podmonitors", "prometheusrules")
_GROUP = "monitoring.coreos.com"


def serve_prometheus_operators_kinds(kube: Kube) -> None:
    """Apply the CRDs and wait until the kinds are served; does nothing to a server that has them."""
    for crd in _crds():
        kube.apply(crd)
        plural, version = crd["spec"]["names"]["plural"], crd["spec"]["versions"][0]["name"]
        path = f"/apis/{_GROUP}/{version}/{plural}"
        kube.wait(lambda path=path: kube.call("GET", path).code == 200, f"the API server serves {plural}")


@functools.cache
def _crds() -> list[Document]:
    with tempfile.TemporaryDirectory() as place:  # no go.mod, so that nothing else is resolved
        command = ["go", "mod", "download", "-json", MODULE]
        environment = {**os.environ, "GOFLAGS": "-mod=mod", "GO111MODULE": "on", "GOTOOLCHAIN": "local"}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{MODULE} cannot be downloaded: {done.stdout}{done.stderr}"
    folder = Path(json.loads(done.stdout)["Dir"]) / "example" / "prometheus-operator-crd"
    return [load_yaml((folder / f"{_GROUP}_{kind}.yaml").read_text()) for kind in KINDS]
