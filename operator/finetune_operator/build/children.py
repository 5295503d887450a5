"""The children of one FineTuneJob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.build.config_map import build_config_map
from finetune_operator.build.inputs import Inputs
from finetune_operator.build.job import build_job
from finetune_operator.build.service import build_service
from finetune_operator.settings import OperatorSettings

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Children:
    """Manifests in the order in which they are applied: pods need the ConfigMap, and names before they start."""

    config_map: Manifest
    service: Manifest
    job: Manifest

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return (self.config_map, self.service, self.job)


def build_children(
    resource: Mapping[str, Any],
    spec: FineTuneJobSpec,
    plan: Plan,
    settings: OperatorSettings,
    config_map_name: str | None = None,
) -> Children:
    """What a job consists of. ``resource`` is the FineTuneJob as the API server has it.

    ``config_map_name``: the one that the pods of an existing Job mount. Its content is immutable: create it where it is
    absent, and leave it alone where it exists.

    Raises:
        SpecError: the configuration of the trainer does not fit into a ConfigMap.
    """
    inputs = Inputs(resource, spec, plan, settings)
    config_map = build_config_map(inputs, config_map_name)
    return Children(config_map, build_service(inputs), build_job(inputs, config_map["metadata"]["name"]))
