"""A FineTuneJob as the API server holds it, typed as far as the views need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_api.exits import ExitClass
from finetune_api.status import Condition, FineTuneJobStatus

COMPLETE, FAILED, INVALID = "Complete", "Failed", "Invalid"
_WITHOUT_OPERATOR = "no operator has looked at it yet"


@dataclass(frozen=True)
class Job:
    """``raw`` is the whole object; ``status`` is read leniently: an operator may be newer than this client."""

    raw: Mapping[str, Any]
    status: FineTuneJobStatus

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"]["uid"])

    @property
    def created(self) -> datetime:
        return parse_time(str(self.raw["metadata"]["creationTimestamp"]))

    @property
    def spec(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.raw.get("spec") or {}
        return spec

    @property
    def nodes(self) -> int:
        """Pods of the job."""
        return int((self.spec.get("distributed") or {}).get("nodes") or 1)

    @property
    def processes_per_node(self) -> int:
        """Ranks per pod: as asked, else the accelerators, else one (the planner's rule)."""
        asked = (self.spec.get("distributed") or {}).get("processesPerNode")
        accelerator = (self.spec.get("resources") or {}).get("accelerator") or {}
        return int(asked or accelerator.get("count") or 1)

    @property
    def suspended(self) -> bool:
        """Whether the spec asks for suspension."""
        return bool((self.spec.get("runPolicy") or {}).get("suspend"))

    @property
    def state(self) -> str:
        """The human word; ``Deleting`` once deletion was asked for, ``Unseen`` before the operator's first look."""
        if self.raw["metadata"].get("deletionTimestamp"):
            return "Deleting"
        return self.status.state or "Unseen"

    @property
    def message(self) -> str:
        return self.status.message or ("" if self.status.state else _WITHOUT_OPERATOR)

    def condition(self, kind: str) -> Condition | None:
        """The condition of this type, in any letter case."""
        wanted = kind.lower()
        return next((known for known in self.status.conditions if known.type.lower() == wanted), None)

    def holds(self, kind: str, status: str = "True") -> bool:
        """Whether a condition has this status, judged by the operator for the spec as it is now (as kubectl wait)."""
        known = self.condition(kind)
        if known is None or known.status != status:
            return False
        generation = int(self.raw["metadata"].get("generation") or 0)
        return known.observed_generation is None or known.observed_generation >= generation

    @property
    def ended(self) -> str | None:
        """``Complete``, ``Failed`` or ``Invalid`` once nothing more will happen, else ``None``."""
        for kind in (COMPLETE, FAILED):
            known = self.condition(kind)
            if known is not None and known.status == "True":
                return kind
        # A spec that was mended is not judged yet; a job whose spec an older operator cannot read goes on.
        invalid = self.status.state in {None, INVALID} and self.holds("Accepted", "False")
        return INVALID if invalid else None

    @property
    def exit_class(self) -> ExitClass:
        """How an ended job ended: the reason of its condition, else the exit code of its last attempt."""
        if self.ended == COMPLETE:
            return ExitClass.COMPLETED
        if self.ended == INVALID:
            return ExitClass.INVALID_SPEC
        failed = self.condition(FAILED)
        if failed is not None and failed.reason in {known.value for known in ExitClass}:
            return ExitClass(failed.reason)
        codes = [attempt.exit_code for attempt in self.status.attempts if attempt.exit_code]
        return ExitClass.from_code(codes[-1]) if codes else ExitClass.INTERNAL_ERROR


def read_job_object(raw: Mapping[str, Any]) -> Job:
    """The API server's object as a :class:`Job`."""
    return Job(raw, read_status(raw.get("status") or {}))


def read_status(raw: Mapping[str, Any]) -> FineTuneJobStatus:
    """The status as far as this version understands it: what it does not know is left out, never an error."""
    content = _copy(raw)
    for _ in range(1000):
        try:
            return FineTuneJobStatus.model_validate(content)
        except ValidationError as error:
            _drop(content, error.errors()[0]["loc"])  # one at a time: positions in lists move
    return FineTuneJobStatus()


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(item) for item in node] if isinstance(node, list | tuple) else node


def _drop(content: Any, location: tuple[int | str, ...]) -> None:
    """Remove the innermost existing part of ``location``; a required field that is missing takes its owner along."""
    owner, key, node = None, None, content
    for step in location:
        present = step in node if isinstance(node, dict) else isinstance(node, list) and int(step) < len(node)
        if not present:
            break
        owner, key, node = node, step, node[step]
    if owner is not None and key is not None:
        del owner[key]


def parse_time(text: str) -> datetime:
    """RFC 3339 as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
