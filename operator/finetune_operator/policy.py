"""What a valid job may not do here: the administrator's rules, and what the API server would refuse of its children.

Pure: an ordered tuple of small questions. Every problem is found at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from finetune_api.credentials import ENDPOINT_VARIABLES, VARIABLES
from finetune_api.errors import Problem
from finetune_api.kubernetes_names import is_label_key, is_label_value, is_subdomain
from finetune_api.quantities import format_bytes
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_rules import locations
from finetune_api.uris import claim_of, is_claim_name, without_secrets
from finetune_operator.build.labels import copied_from
from finetune_operator.settings import OperatorSettings

MOST_COPIED = 32  # labels, and annotations, that go from a FineTuneJob to its Job
MOST_COPIED_BYTES = 16 * 1024

Question = Callable[[FineTuneJobSpec, OperatorSettings], Iterator[Problem]]


def policy_problems(
    spec: FineTuneJobSpec, settings: OperatorSettings, metadata: Mapping[str, Any] | None = None
) -> list[Problem]:
    """Everything that forbids this job in this cluster. ``metadata``: of the FineTuneJob."""
    problems = [problem for question in QUESTIONS for problem in question(spec, settings)]
    return problems + list(_copied(metadata or {}))


def _schemes(spec: FineTuneJobSpec, settings: OperatorSettings) -> Iterator[Problem]:
    allowed = settings.uris.schemes
    for path, uri, _ in locations(spec):
        scheme = uri.partition("://")[0]
        if scheme not in allowed and scheme != "file":  # of file:// the schema says why not
            listed = ", ".join(f"{name}://" for name in allowed) or "none"
            yield Problem(
                f"{path}.uri", without_secrets(uri), f"{scheme}:// is not allowed in this cluster", f"use {listed}"
            )


def _hosts(spec: FineTuneJobSpec, settings: OperatorSettings) -> Iterator[Problem]:
    allowed = settings.uris.hosts
    for path, uri, _ in locations(spec):
        host = uri.partition("://")[2].partition("/")[0]
        if not allowed or uri.startswith(("pvc://", "file://")) or any(_host_matches(host, rule) for rule in allowed):
            continue
        what = {"hf": "repository owner", "az": "container"}.get(uri.partition("://")[0], "bucket")
        yield Problem(
            f"{path}.uri",
            without_secrets(uri),
            f"{what} '{host}' is not allowed in this cluster",
            f"use {', '.join(allowed)}",
        )


def _host_matches(host: str, rule: str) -> bool:
    return host.endswith(rule[1:]) and host != rule[1:] if rule.startswith("*.") else host == rule


def _endpoints(spec: FineTuneJobSpec, settings: OperatorSettings) -> Iterator[Problem]:
    """A named endpoint is a listed one. ``s3://`` and ``az://`` have to name one: whoever is asked owns the bucket.

    An Azure account stands in a Secret that only the pod sees; of ``gs://`` and ``hf://`` there is one owner.
    """
    allowed = settings.uris.endpoints
    if not allowed:
        return
    listed = ", ".join(allowed)
    own = settings.pod_defaults.environment
    settled = {
        scheme: any(own.get(name) for name in VARIABLES[scheme] if name in ENDPOINT_VARIABLES)
        for scheme in ("s3", "az")
    }
    for path, uri, location in locations(spec):
        if location.endpoint is None and not settled.get(uri.partition("://")[0], True):
            rule = "is missing, and this cluster allows only listed endpoints"
            yield Problem(f"{path}.endpoint", None, rule, f"use {listed}")
        elif location.endpoint and _canonical(location.endpoint) not in {_canonical(endpoint) for endpoint in allowed}:
            yield Problem(f"{path}.endpoint", location.endpoint, "is not allowed in this cluster", f"use {listed}")


def _canonical(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    default = {"http": ":80", "https": ":443"}.get(parts.scheme.lower(), "")
    return f"{parts.scheme.lower()}://{parts.netloc.lower().removesuffix(default)}{parts.path.rstrip('/')}"


def _remote_code(spec: FineTuneJobSpec, settings: OperatorSettings) -> Iterator[Problem]:
    if spec.model.trust_remote_code and not settings.trust_remote_code:
        yield Problem(
            "spec.model.trustRemoteCode",
            True,
            "code of a model runs here only with the administrator's consent",
            "remove it, or ask for trustRemoteCode in the operator's settings",
        )


def _claims(spec: FineTuneJobSpec, _settings: OperatorSettings) -> Iterator[Problem]:
    for path, uri, _ in locations(spec):
        claim = claim_of(uri)
        if claim is not None and not is_claim_name(claim):
            yield Problem(f"{path}.uri", uri, "names no PersistentVolumeClaim", "write pvc://CLAIM/PATH in lower case")


def _placement(spec: FineTuneJobSpec, _settings: OperatorSettings) -> Iterator[Problem]:
    placement = spec.placement
    keys = [(f"spec.placement.nodeSelector.{key}", key) for key in placement.node_selector]
    keys += [("spec.placement.topologyKey", placement.topology_key)]
    keys += [(f"spec.placement.tolerations[{i}].key", item.key or "") for i, item in enumerate(placement.tolerations)]
    for path, key in keys:
        if key and not is_label_key(key):
            yield Problem(
                path, key, "is no label of a node", "write it as NAME or PREFIX/NAME, such as example.com/rack"
            )
    values = [(f"spec.placement.nodeSelector.{key}", value) for key, value in placement.node_selector.items()]
    values += [(f"spec.placement.tolerations[{i}].value", t.value or "") for i, t in enumerate(placement.tolerations)]
    for path, value in values:
        if not is_label_value(value):
            yield Problem(path, value, "is no label value", "use letters, digits, '-', '_' and '.'")
    names = (("priorityClassName", placement.priority_class_name), ("schedulerName", placement.scheduler_name))
    for field, name in names:
        if name and not is_subdomain(name):
            yield Problem(f"spec.placement.{field}", name, "is no name", "use lower-case letters, digits, '-' and '.'")


def _tolerations(spec: FineTuneJobSpec, _settings: OperatorSettings) -> Iterator[Problem]:
    for number, toleration in enumerate(spec.placement.tolerations):
        if not toleration.key and toleration.operator != "Exists":
            path = f"spec.placement.tolerations[{number}].operator"
            yield Problem(
                path, toleration.operator, "must be Exists where no key is named", "name a key, or set Exists"
            )


def _accelerator(spec: FineTuneJobSpec, _settings: OperatorSettings) -> Iterator[Problem]:
    accelerator = spec.resources.accelerator
    if accelerator is None:
        return
    name = accelerator.resource_name
    # The API server's own definition; what is left are amounts of the node itself and names of quotas.
    if not is_label_key(f"requests.{name}") or "kubernetes.io/" in name or name.startswith("requests."):
        yield Problem(
            "spec.resources.accelerator.resourceName",
            accelerator.resource_name,
            "is no extended resource",
            "name the one that the device plugin offers, such as nvidia.com/gpu",
        )


def _copied(metadata: Mapping[str, Any]) -> Iterator[Problem]:
    """Labels and annotations that go to the Job are few and short."""
    for field in ("labels", "annotations"):
        entries = copied_from(metadata, field)
        size = sum(len(key.encode()) + len(value.encode()) for key, value in entries.items())
        noun = "entry" if len(entries) == 1 else "entries"
        rule = f"has {len(entries)} {noun} ({format_bytes(size)}) to be copied to the Job"
        if len(entries) > MOST_COPIED or size > MOST_COPIED_BYTES:
            remedy = f"keep at most {MOST_COPIED} and {format_bytes(MOST_COPIED_BYTES)} of finetune.dev/"
            yield Problem(f"metadata.{field}", None, rule, remedy)


QUESTIONS: tuple[Question, ...] = (
    _schemes,
    _hosts,
    _endpoints,
    _remote_code,
    _claims,
    _placement,
    _tolerations,
    _accelerator,
)
