"""Writing Kubernetes Events. One that cannot be written after a few tries is lost, and that is logged."""

from __future__ import annotations

import asyncio
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
_PAUSES = (0.2, 0.6, 1.8)  # seconds between tries: a worker waits meanwhile
_LONGEST_PAUSE = 5.0  # whatever the API server asks for


async def tell(kube: Kube, resource: Mapping[str, Any], events: Iterable[Event]) -> None:
    """Write events. The same event of the same generation has one name, so a repetition is refused, not told twice."""
    for event in events:
        manifest = event_manifest(resource, event, datetime.now(UTC))
        for pause in (*_PAUSES, None):
            error = await _write(kube, manifest)
            if error is None:
                break
            if pause is None or not error.retriable:
                log_of(resource).warning("event %s could not be written: %s", event.reason, error)
                break
            await asyncio.sleep(min(error.retry_after_seconds or pause, _LONGEST_PAUSE))


async def _write(kube: Kube, manifest: Mapping[str, Any]) -> ApiError | None:
    """What went wrong. That it is there already is no error: an answer may have been lost."""
    try:
        await kube.create(EVENTS, manifest)
    except ApiError as error:
        return None if error.status == 409 else error
    return None


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
