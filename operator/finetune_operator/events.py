"""Writing Kubernetes Events. Losing one is no harm: failures are only logged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_api import API_GROUP, API_VERSION, KIND
from finetune_operator.kube import EVENTS, FIELD_MANAGER, ApiError, Kube
from finetune_operator.logs import log_of
from finetune_operator.verdict import Event

_LONGEST_NOTE = 1024  # bytes; set by the API


async def tell(kube: Kube, resource: Mapping[str, Any], events: Iterable[Event]) -> None:
    """Write events. The same event of the same generation has one name, so a repetition is refused, not told twice."""
    for event in events:
        try:
            await kube.create(EVENTS, event_manifest(resource, event, datetime.now(UTC)))
        except ApiError as error:
            if error.status != 409:
                log_of(resource).warning("event %s could not be written: %s", event.reason, error)


def event_manifest(resource: Mapping[str, Any], event: Event, now: datetime) -> dict[str, Any]:
    """An events.k8s.io/v1 Event."""
    metadata = resource["metadata"]
    told = f"{metadata['uid']} {metadata.get('generation')} {event.reason} {event.message}"
    note = event.message.encode()
    if len(note) > _LONGEST_NOTE:
        note = note[: _LONGEST_NOTE - 3].decode(errors="ignore").encode() + b"..."
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {
            "namespace": metadata["namespace"],
            "name": f"{metadata['name']}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
        },
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "reportingController": FIELD_MANAGER,
        "reportingInstance": os.environ.get("HOSTNAME", FIELD_MANAGER)[:128] or FIELD_MANAGER,
        "action": event.reason,
        "reason": event.reason,
        "type": event.type.value,
        "note": note.decode(),
        "regarding": {
            "apiVersion": f"{API_GROUP}/{API_VERSION}",
            "kind": KIND,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
        },
    }
