"""The headless Service through which the pods of a job find each other, and Prometheus finds them."""

from __future__ import annotations

from typing import Any

from finetune_operator.build.inputs import Inputs
from finetune_operator.build.labels import child_metadata, child_name, selector

RENDEZVOUS_PORT = 29400
METRICS_PORT = 9464


def build_service(inputs: Inputs) -> dict[str, Any]:
    """One DNS name per pod: ``ftj-NAME-0.ftj-NAME``."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(inputs, child_name(inputs)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # launchers look for each other before any of them is ready
            "selector": selector(inputs),
            "ports": [
                {"name": "rendezvous", "port": RENDEZVOUS_PORT, "targetPort": "rendezvous", "protocol": "TCP"},
                {"name": "metrics", "port": METRICS_PORT, "targetPort": "metrics", "protocol": "TCP"},
            ],
        },
    }


def rendezvous_endpoint(inputs: Inputs) -> str:
    """``host:port`` of the launcher with node rank 0."""
    return f"{child_name(inputs)}-0.{child_name(inputs)}:{RENDEZVOUS_PORT}"
