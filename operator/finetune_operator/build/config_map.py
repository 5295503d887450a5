"""The immutable ConfigMap that holds a job's TrainerConfig."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from finetune_api.errors import Problem, SpecError
from finetune_api.quantities import format_bytes
from finetune_api.spec import RunPolicy
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_operator.build.inputs import Inputs
from finetune_operator.build.labels import child_metadata, child_name
from finetune_operator.build.service import METRICS_PORT, rendezvous_endpoint
from finetune_operator.build.volumes import CACHE_DIRECTORY, RUN_DIRECTORY

KEY = "trainer.json"
TERMINATION_MESSAGE_PATH = "/dev/termination-log"
MOST_BYTES = 1024 * 1024 - 16 * 1024  # the API server allows 1 MiB; the rest is for names and metadata
_LONGEST_MARGIN_SECONDS = 10


def build_config_map(inputs: Inputs, name: str | None = None) -> dict[str, Any]:
    """``name``: what it is called already; else a name that carries a digest of the content.

    Raises:
        SpecError: it is too large for a ConfigMap.
    """
    content = trainer_config_text(inputs)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": child_metadata(inputs, name or f"{child_name(inputs)}-{digest}"),
        "immutable": True,
        "data": {KEY: content},
    }


def trainer_config_text(inputs: Inputs) -> str:
    """The TrainerConfig as JSON: the same bytes for the same inputs.

    Raises:
        SpecError: it is too large for a ConfigMap.
    """
    values = trainer_config(inputs).model_dump(mode="json", by_alias=True)  # null is not absent: it may differ
    content = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    size = len(content.encode())
    if size > MOST_BYTES:
        raise SpecError(
            [
                Problem(
                    "spec",
                    None,
                    f"makes a trainer configuration of {format_bytes(size)}, and a ConfigMap holds "
                    f"{format_bytes(MOST_BYTES)}",
                    "name fewer data sources, for instance with a '*' in spec.dataset.train[].uri",
                )
            ]
        )
    return content


def trainer_config(inputs: Inputs) -> TrainerConfig:
    """What the launchers of this job start from."""
    spec, plan, settings = inputs.spec, inputs.plan, inputs.settings
    # Of the run policy a launcher needs the number of restarts; what may change while it runs would only blur the name.
    run_policy = RunPolicy(max_restarts=spec.run_policy.max_restarts)
    return TrainerConfig(
        job=JobIdentity(namespace=inputs.namespace, name=inputs.name, uid=inputs.uid),
        spec=spec.model_copy(update={"run_policy": run_policy}),
        plan=plan,
        rendezvous=Rendezvous(
            endpoint=rendezvous_endpoint(inputs),
            minimum_nodes=plan.nodes,
            maximum_nodes=plan.nodes,
            timeout_seconds=settings.rendezvous_timeout_seconds,
        ),
        work_directory=RUN_DIRECTORY,
        cache_directory=CACHE_DIRECTORY,
        metrics_port=METRICS_PORT,
        termination_message_path=TERMINATION_MESSAGE_PATH,
        termination_grace_seconds=ranks_grace_seconds(settings.pod_defaults.termination_grace_period_seconds),
        collective_timeout_seconds=settings.collective_timeout_seconds,
        allow_remote_code=settings.trust_remote_code,
    )


def ranks_grace_seconds(pod_grace_seconds: int) -> int:
    """What ranks have of the pod's grace period; the rest is the launcher's, to end them and to say how it ended."""
    return max(1, pod_grace_seconds - min(_LONGEST_MARGIN_SECONDS, max(1, pod_grace_seconds // 5)))
