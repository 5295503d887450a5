"""One replica works, others stand by: a coordination.k8s.io Lease, released on the way out.

The rules of client-go's leader election: a holder renews within the deadline or stops; another one takes a lease that
was not renewed for its whole duration *as seen on its own clock*, so that skewed clocks do no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube import LEASES, ApiError, Kube
from finetune_operator.settings import LeaseSettings

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Somebody else may be working now: stop at once."""


class Lease:
    """Hold, renew, release."""

    def __init__(self, kube: Kube, settings: LeaseSettings) -> None:
        assert settings.namespace is not None
        self._kube = kube
        self._settings = settings
        self._namespace = settings.namespace
        self.identity = f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        self._seen: tuple[str, float] = ("", 0.0)  # resourceVersion of somebody else's lease, and when it was new
        self._held: dict[str, Any] | None = None

    async def acquire(self) -> None:
        """Return when this replica holds the lease."""
        waiting = False
        while not await self._try():
            if not waiting:
                log.info("standing by: another replica holds the lease %s", self._settings.name)
                waiting = True
            await asyncio.sleep(self._settings.retry_seconds)
        log.info("holding the lease %s as %s", self._settings.name, self.identity)

    async def keep(self) -> None:
        """Renew for ever. Raises LeaseLost when renewing has failed for the whole deadline."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(self._settings.retry_seconds)
            left = self._settings.renew_deadline_seconds - (time.monotonic() - renewed)
            held = False
            with contextlib.suppress(TimeoutError):  # an API server that does not answer renews nothing
                async with asyncio.timeout(max(0.0, left)):
                    held = await self._try()
            if held:
                renewed = time.monotonic()
            elif self._held is None or time.monotonic() - renewed >= self._settings.renew_deadline_seconds:
                raise LeaseLost(f"the lease {self._settings.name} could not be renewed")

    async def release(self) -> None:
        """Let the next replica start at once."""
        while self._held is not None:
            spec = {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
            held, self._held = self._held, None
            try:
                await self._kube.merge(LEASES, held, {"spec": spec})
                log.info("released the lease %s", self._settings.name)
            except ApiError as error:
                if error.status == 409 and await self._still_ours():  # our last renewal, whose answer was not awaited
                    continue
                log.warning("the lease could not be released, the next replica waits for it: %s", error)

    async def _try(self) -> bool:
        """Take, or renew."""
        try:
            if self._held is not None:
                self._held = await self._kube.merge(LEASES, self._held, {"spec": {"renewTime": _now()}})
                return True
            return await self._take()
        except ApiError as error:
            if error.status == 409 and self._held is not None:
                await self._still_ours()
                return False
            if error.status not in {409, 404}:
                log.warning("lease %s: %s", self._settings.name, error)
            return False

    async def _still_ours(self) -> bool:
        """Somebody wrote to the lease (an administrator's label, or another replica that took it): see what it is."""
        try:
            current = await self._kube.get(LEASES, self._namespace, self._settings.name)
        except ApiError:
            return False
        ours: bool = current.get("spec", {}).get("holderIdentity") == self.identity
        self._held = current if ours else None
        return ours

    async def _take(self) -> bool:
        try:
            current = await self._kube.get(LEASES, self._namespace, self._settings.name)
        except ApiError as error:
            if error.status != 404:
                raise
            manifest = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"namespace": self._namespace, "name": self._settings.name},
                "spec": {**self._spec(), "leaseTransitions": 0},
            }
            self._held = await self._kube.create(LEASES, manifest)
            return True
        spec = current.get("spec", {})
        if spec.get("holderIdentity") and not self._expired(current):
            return False
        transitions = int(spec.get("leaseTransitions") or 0) + 1
        self._held = await self._kube.merge(
            LEASES, current, {"spec": {**self._spec(), "leaseTransitions": transitions}}
        )
        return True

    def _expired(self, current: dict[str, Any]) -> bool:
        version = current["metadata"]["resourceVersion"]
        if self._seen[0] != version:
            self._seen = (version, time.monotonic())
            return False
        duration = current["spec"].get("leaseDurationSeconds") or self._settings.duration_seconds
        return time.monotonic() - self._seen[1] > duration

    def _spec(self) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._settings.duration_seconds,
            "acquireTime": _now(),
            "renewTime": _now(),
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
