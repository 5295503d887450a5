"""Prometheus on the host: finds the pods of the operator and of training as a PodMonitor would, asks every second."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from deploy.local.cluster import processes
from deploy.local.cluster.layout import API_PORT, HOST, PROMETHEUS, Layout

_OURS = "finetune-operator"


def configuration(layout: Layout) -> dict[str, Any]:
    """What is scraped: ports named ``metrics`` of pods that carry our name, the API server, and the nodes' cAdvisor."""
    identity = {
        "ca_file": f"{layout.pki}/ca.crt",
        "cert_file": f"{layout.pki}/prometheus.crt",
        "key_file": f"{layout.pki}/prometheus.key",
    }
    server = f"https://{HOST}:{API_PORT}"
    return {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{layout.prometheus_rules}/*"],
        "scrape_configs": [
            {
                "job_name": "pods",
                "kubernetes_sd_configs": [{"role": "pod", "api_server": server, "tls_config": identity}],
                "relabel_configs": _pod_labels(),
            },
            {
                "job_name": "apiserver",
                "scheme": "https",
                "tls_config": identity,
                "scrape_interval": "5s",
                "scrape_timeout": "5s",
                "static_configs": [{"targets": [f"{HOST}:{API_PORT}"]}],
            },
            {
                "job_name": "cadvisor",
                "scheme": "https",
                "tls_config": identity,
                "scrape_interval": "5s",
                "scrape_timeout": "5s",
                "metrics_path": "/metrics/cadvisor",
                "kubernetes_sd_configs": [{"role": "node", "api_server": server, "tls_config": identity}],
            },
        ],
    }


def _pod_labels() -> list[dict[str, Any]]:
    meta = "__meta_kubernetes_pod"
    names = [f"{meta}_label_app_kubernetes_io_{label}" for label in ("name", "managed_by", "part_of")]
    targets = {
        "__meta_kubernetes_namespace": "namespace",
        f"{meta}_name": "pod",
        f"{meta}_container_name": "container",
        f"{meta}_node_name": "node",
        f"{meta}_label_finetune_dev_job": "finetune_job",  # as deploy/prometheus/scrape.yaml and the PodMonitor say
        f"{meta}_label_batch_kubernetes_io_job_completion_index": "finetune_node",
    }
    return [
        {"source_labels": names, "action": "keep", "regex": f"(.*;)?{_OURS}(;.*)?"},
        {"source_labels": [f"{meta}_container_port_name"], "action": "keep", "regex": "metrics"},
        {"source_labels": [f"{meta}_phase"], "action": "drop", "regex": "Succeeded|Failed"},
        *({"source_labels": [source], "target_label": target} for source, target in targets.items()),
    ]


def start(layout: Layout, program: Path) -> None:
    """Returns at once; `ready` says when it serves."""
    layout.prometheus_rules.mkdir(parents=True)
    file = layout.state / "prometheus" / "prometheus.json"
    file.write_text(json.dumps(configuration(layout), indent=1))
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={layout.disk / 'prometheus'}"]
    command += [f"--web.listen-address={PROMETHEUS}", "--web.enable-lifecycle", "--log.level=warn"]
    processes.start(layout, "prometheus", command, {**os.environ, "GOMEMLIMIT": "512MiB"})


def ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://{PROMETHEUS}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
