"""Conditions: always in the same order, a transition time that moves only with the status. Pure.

``Reconciling`` and ``Stalled`` follow kstatus, so that kubectl, Flux and Argo CD understand a FineTuneJob unaided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_api.status import Condition
from finetune_operator.sentences import listed

ORDER = (
    "Accepted",
    "PodsReady",
    "Running",
    "Suspended",
    "ArtifactsPublished",
    "Complete",
    "Failed",
    "Reconciling",
    "Stalled",
)
_ALWAYS = {"Accepted", "PodsReady", "Running", "Reconciling"}  # the others appear when they first become True


@dataclass(frozen=True)
class Say:
    """What one condition shall say. ``status``: True, False or None (unknown)."""

    status: bool | None
    reason: str
    message: str = ""


def merge(before: Sequence[Condition], said: Mapping[str, Say], generation: int, now: str) -> tuple[Condition, ...]:
    """The conditions after this look; what nobody spoke about stays as it was, and holds for this generation too."""
    old = {condition.type: condition for condition in before}
    seen = {"observed_generation": generation}
    merged = {kind: found.model_copy(update=seen) for kind, found in old.items() if kind in ORDER}
    for kind, say in said.items():
        known = old.get(kind)
        if known is None and say.status is False and kind not in _ALWAYS:
            continue
        status = {True: "True", False: "False", None: "Unknown"}[say.status]
        merged[kind] = Condition(
            type=kind,
            status=status,
            reason=say.reason,
            message=listed(say.message.split("\n")),
            observed_generation=generation,
            last_transition_time=known.last_transition_time if known and known.status == status else now,
        )
    return tuple(merged[kind] for kind in ORDER if kind in merged)
