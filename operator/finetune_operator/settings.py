"""The operator's configuration: one file, every key documented in the chart's values.yaml."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from finetune_api.errors import Problem, SpecError
from finetune_api.fields import DnsLabel, Quantity, SchemaModel
from finetune_api.spec import Toleration

Seconds = Annotated[int, Field(ge=1, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]  # 0: any free port


class PullPolicy(StrEnum):
    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


class PodDefaults(SchemaModel):
    """What every training pod gets unless its job says otherwise."""

    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    priority_class_name: str = ""
    runtime_class_name: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    environment: dict[str, str] = {}
    termination_grace_period_seconds: Seconds = 120
    shared_memory: Quantity = "1Gi"
    scratch: Quantity | None = None  # size limit of the pod's scratch volumes


class UriRules(SchemaModel):
    """Which places jobs may read from and write to. Empty lists of hosts and endpoints allow any."""

    schemes: tuple[str, ...] = ("s3", "gs", "az", "hf", "pvc")
    hosts: tuple[str, ...] = ()  # bucket, account or repository owner; "*.suffix" allowed
    endpoints: tuple[str, ...] = ()


class ProgressSettings(SchemaModel):
    interval_seconds: Seconds = 10
    timeout_seconds: Seconds = 3


class LeaseSettings(SchemaModel):
    enabled: bool = True
    name: DnsLabel = "finetune-operator"
    namespace: DnsLabel | None = None  # required if enabled
    duration_seconds: Seconds = 15
    renew_deadline_seconds: Seconds = 10
    retry_seconds: Seconds = 2


class PortSettings(SchemaModel):
    port: Port


class LogSettings(SchemaModel):
    format: LogFormat = LogFormat.JSON
    level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"


class OperatorSettings(SchemaModel):
    namespaces: tuple[DnsLabel, ...] = ()  # empty: the whole cluster
    trainer_image: Annotated[str, Field(min_length=1, max_length=512)]
    trainer_image_pull_policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    image_pull_secrets: tuple[DnsLabel, ...] = ()
    pod_defaults: PodDefaults = PodDefaults()
    uris: UriRules = UriRules()
    trust_remote_code: bool = False  # the administrator's consent
    progress: ProgressSettings = ProgressSettings()
    collective_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 600
    rendezvous_timeout_seconds: Seconds = 600
    concurrency: Annotated[int, Field(ge=1, le=256)] = 48  # reconciles at once
    lease: LeaseSettings = LeaseSettings()
    metrics: PortSettings = PortSettings(port=8080)
    health: PortSettings = PortSettings(port=8081)
    log: LogSettings = LogSettings()


def read_settings(path: Path) -> OperatorSettings:
    """The settings at ``path``.

    Raises:
        SpecError: the file cannot be read, or every key in it that is wrong.
    """
    try:
        settings = OperatorSettings.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SpecError(
            [Problem(str(path), None, f"cannot be read ({error.strerror})", "name it with --config")]
        ) from None
    except ValueError as error:
        raise SpecError(_problems(path, error)) from None
    if settings.lease.enabled and settings.lease.namespace is None:
        raise SpecError(
            [Problem("lease.namespace", None, "is missing", "name the operator's namespace, or disable the lease")]
        )
    return settings


def _problems(path: Path, error: ValueError) -> list[Problem]:
    if not isinstance(error, ValidationError):
        return [Problem(str(path), None, f"is not JSON ({error})", "correct it")]
    return [
        Problem(
            ".".join(str(part) for part in found["loc"]) or str(path),
            found["input"] if found["type"] != "missing" else None,
            "is not a setting" if found["type"] == "extra_forbidden" else found["msg"].lower(),
            f"correct {path}",
        )
        for found in error.errors(include_url=False)
    ]
