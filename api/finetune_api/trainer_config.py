"""The file a launcher starts from: written by the operator (ConfigMap) or by the local backend, read by the trainer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.fields import SchemaModel
from finetune_api.plan import Plan
from finetune_api.spec import FineTuneJobSpec


class JobIdentity(SchemaModel):
    """Names the job everywhere: in prefixes, metrics, reports."""

    namespace: Annotated[str, Field(min_length=1, max_length=63)] = "default"
    name: Annotated[str, Field(min_length=1, max_length=253)]
    uid: Annotated[str, Field(min_length=1, max_length=64)]  # local runs: digest of what defines the result


class Rendezvous(SchemaModel):
    """Where launchers of one job meet (torch.distributed c10d store)."""

    endpoint: Annotated[str, Field(max_length=300)]  # host:port; the launcher with node rank 0 hosts the store
    minimum_nodes: Annotated[int, Field(ge=1)]
    maximum_nodes: Annotated[int, Field(ge=1)]
    timeout_seconds: Annotated[int, Field(ge=1)] = 600


class TrainerConfig(SchemaModel):
    """Everything a launcher needs besides credentials (environment) and its node rank (environment)."""

    schema_version: Literal[1] = 1
    job: JobIdentity
    spec: FineTuneJobSpec
    plan: Plan
    rendezvous: Rendezvous
    work_directory: str  # scratch of this node: progress files, staging; may vanish
    cache_directory: str  # prepared data and downloaded models; may be shared between nodes and jobs
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 9464  # 0: any free port (written to <work>/launcher.json)
    termination_message_path: str | None = None  # absent: <work>/termination.json
    termination_grace_seconds: Annotated[int, Field(ge=1, le=86_400)] = 120
    collective_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 600
    allow_remote_code: bool = False  # the administrator's consent
