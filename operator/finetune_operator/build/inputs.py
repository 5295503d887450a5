"""What every builder is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.settings import OperatorSettings


@dataclass(frozen=True)
class Inputs:
    """One job, its plan, and the administrator's settings."""

    resource: Mapping[str, Any]  # the FineTuneJob
    spec: FineTuneJobSpec
    plan: Plan
    settings: OperatorSettings

    @property
    def name(self) -> str:
        return str(self.resource["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.resource["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.resource["metadata"]["uid"])
