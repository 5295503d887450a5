"""Where pods go and when they may start: the one place that knows which scheduler a cluster has.

Today: the default scheduler, pod by pod. A gang scheduler becomes one more :class:`Scheduler`, chosen in
``scheduler_for``; nothing else changes.
"""

from __future__ import annotations

from typing import Any, Protocol

from finetune_operator.build.inputs import Inputs
from finetune_operator.build.labels import copied, selector

_HOST = "kubernetes.io/hostname"


class Scheduler(Protocol):
    """What a scheduler adds to the Job of a gang."""

    def job_metadata(self, inputs: Inputs) -> dict[str, dict[str, str]]:
        """``labels`` and ``annotations`` of the Job."""

    def job_spec(self, inputs: Inputs) -> dict[str, Any]:
        """Fields of the Job's spec, such as ``suspend``."""

    def pod_spec(self, inputs: Inputs) -> dict[str, Any]:
        """Fields of the pod's spec."""


class PodByPod:
    """No gang scheduling: every pod is placed as soon as it fits somewhere."""

    def job_metadata(self, inputs: Inputs) -> dict[str, dict[str, str]]:
        return {field: copied(inputs, field) for field in ("labels", "annotations")}

    def job_spec(self, inputs: Inputs) -> dict[str, Any]:
        return {"suspend": inputs.spec.run_policy.suspend}

    def pod_spec(self, inputs: Inputs) -> dict[str, Any]:
        return {**_placement(inputs), **_nearness(inputs)}


def scheduler_for(_inputs: Inputs) -> Scheduler:
    """The scheduler that this job is handed to."""
    return PodByPod()


def _placement(inputs: Inputs) -> dict[str, Any]:
    """The administrator's defaults, and what the job adds to them or puts in their place."""
    asked, defaults = inputs.spec.placement, inputs.settings.pod_defaults
    tolerations = dict.fromkeys((*defaults.tolerations, *asked.tolerations))
    fields: dict[str, Any] = {
        "nodeSelector": {**defaults.node_selector, **asked.node_selector},
        "tolerations": [item.model_dump(mode="json", by_alias=True, exclude_none=True) for item in tolerations],
        "priorityClassName": asked.priority_class_name or defaults.priority_class_name,
        "schedulerName": asked.scheduler_name,
        "runtimeClassName": defaults.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}


def _nearness(inputs: Inputs) -> dict[str, Any]:
    """All pods within one domain of ``topologyKey``, and as far as possible on different nodes.

    The second is a wish: after the loss of a node its pod may run beside another rather than not at all.
    """
    if inputs.plan.nodes == 1:
        return {}
    own = {"matchLabels": selector(inputs)}
    spread = {"maxSkew": 1, "topologyKey": _HOST, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": own}
    fields: dict[str, Any] = {"topologySpreadConstraints": [spread]}
    if inputs.spec.placement.topology_key:
        term = {"topologyKey": inputs.spec.placement.topology_key, "labelSelector": own}
        fields["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return fields
