"""Pods that somebody has to remove so that the Job can replace them. Pure.

Survivors of a lost pod are left alone: their launchers wait for the replacement by themselves and keep the model and
the prepared data; if nobody comes they end with RendezvousFailed. Only one that does neither is removed.
"""

from __future__ import annotations

from finetune_operator.ends import is_lost
from finetune_operator.observe import PodView, parse_time
from finetune_operator.situation import Situation
from finetune_operator.verdict import DeletePod


def remedies(at: Situation) -> tuple[DeletePod, ...]:
    """Lost pods by force, stuck ones in the ordinary way."""
    lost = tuple(DeletePod(pod.name, pod.uid, force=True) for pod in at.observed.pods or () if is_lost(pod, at.now))
    return lost + tuple(DeletePod(pod.name, pod.uid) for pod in at.newest if _is_stuck(pod, at))


def _is_stuck(pod: PodView, at: Situation) -> bool:
    """Left over from an attempt that ended long ago, and silent: neither its probe nor its page answers."""
    last = at.last_ended()
    ended_at = parse_time(last.ended_at) if last else None
    if ended_at is None or pod.ended or pod.ready or pod.deleted is not None or pod.started is None:
        return False
    if pod.started > ended_at or pod.index in {page.node_rank for page in at.observed.progress}:
        return False
    patience = at.settings.collective_timeout_seconds + at.settings.rendezvous_timeout_seconds
    return (at.now - ended_at).total_seconds() > patience
