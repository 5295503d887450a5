"""The operator's configuration: one file, every key documented in the chart's values.yaml."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.errors import Problem, SpecError
from finetune_api.fields import DnsLabel, Quantity, SchemaModel
from finetune_api.kubernetes_names import is_label_key, is_label_value
from finetune_api.spec import Toleration
from finetune_api.spec_rules import toleration_problems

Seconds = Annotated[int, Field(ge=1, le=86_400)]
Port = Annotated[int, Field(ge=0, le=65_535)]  # 0: any free port

_PART = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?(:[0-9]{{1,5}})?/)?{_PART}(/{_PART})*"
    r"(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_KEY_RULE = "is no key, which is NAME or PREFIX/NAME, such as example.com/team"
_VALUE_RULE = "is no label value, which is up to 63 letters, digits, '-', '_' and '.'"


def _label_key(key: str) -> str:
    if not is_label_key(key):
        raise ValueError(_KEY_RULE)
    return key


def _annotation_key(key: str) -> str:
    _label_key(key.lower())  # as the API server does: an annotation's prefix may have capitals
    return key


def _label_value(value: str) -> str:
    if not is_label_value(value):
        raise ValueError(_VALUE_RULE)
    return value


def _toleration(toleration: Toleration) -> Toleration:
    """What the API server would refuse in every pod."""
    if toleration.key:
        _label_key(toleration.key)
    elif toleration.operator != "Exists":
        raise ValueError("has no key, which goes with operator Exists only")
    _label_value(toleration.value or "")
    for problem in toleration_problems(toleration, ""):
        raise ValueError(problem.rule)
    return toleration


def _image(name: str) -> str:
    if not _IMAGE.fullmatch(name):
        raise ValueError("is no image, which is REPOSITORY, then :TAG or @sha256:DIGEST or both")
    return name


LabelKey = Annotated[str, AfterValidator(_label_key)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
AnnotationKey = Annotated[str, AfterValidator(_annotation_key)]


class PullPolicy(StrEnum):
    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogFormat(StrEnum):
    JSON = "json"
    TEXT = "text"


class PodDefaults(SchemaModel):
    """What every training pod gets unless its job says otherwise."""

    node_selector: dict[LabelKey, LabelValue] = {}
    tolerations: tuple[Annotated[Toleration, AfterValidator(_toleration)], ...] = ()
    priority_class_name: str = ""
    runtime_class_name: str = ""
    labels: dict[LabelKey, LabelValue] = {}
    annotations: dict[AnnotationKey, str] = {}
    environment: dict[str, str] = {}
    termination_grace_period_seconds: Seconds = 120
    shared_memory: Quantity = "1Gi"
    scratch: Quantity | None = None  # size limit of the pod's scratch volumes


class UriRules(SchemaModel):
    """Which places jobs may read from and write to. Empty lists of hosts and endpoints allow any."""

    schemes: tuple[str, ...] = ("s3", "gs", "az", "hf", "pvc")
    hosts: tuple[str, ...] = ()  # bucket, container or repository owner; "*.suffix" allowed
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
    trainer_image: Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_image)]
    trainer_image_pull_policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    image_pull_secrets: tuple[DnsLabel, ...] = ()
    pod_defaults: PodDefaults = PodDefaults()
    uris: UriRules = UriRules()
    trust_remote_code: bool = False  # the administrator's consent
    progress: ProgressSettings = ProgressSettings()
    collective_timeout_seconds: Annotated[int, Field(ge=10, le=86_400)] = 600
    rendezvous_timeout_seconds: Seconds = 600
    concurrency: Annotated[int, Field(ge=1, le=256)] = 100  # reconciles at once
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
            ".".join(str(part) for part in found["loc"] if part != "[key]") or str(path),
            found["input"] if found["type"] != "missing" else None,
            _rule(found),
            f"correct {path}",
        )
        for found in error.errors(include_url=False)
    ]


def _rule(found: ErrorDetails) -> str:
    if found["type"] == "extra_forbidden":
        return "is not a setting"
    return str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"].lower()
