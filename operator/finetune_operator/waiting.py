"""What a job that does not run yet waits for, in one sentence. An ordered tuple of questions; the first match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune_operator.observe import Observed, PodView
from finetune_operator.sentences import as_sentence, count, enumeration

_QUOTA = re.compile(r"exceeded quota|forbidden: .*quota|maximum .* usage per", re.IGNORECASE)
_VOLUME = re.compile(r"FailedMount|FailedAttachVolume|MountVolume|persistentvolumeclaim|unbound", re.IGNORECASE)
_REFUSED = re.compile(r"violates PodSecurity|admission webhook|is forbidden|FailedCreate|Error creating", re.IGNORECASE)
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}

PREPARING = "the launchers prepare"


@dataclass(frozen=True)
class Waiting:
    """``reason`` is a CamelCase word for conditions and events; ``message`` a sentence."""

    reason: str
    message: str


Question = Callable[[Observed, Sequence[PodView]], Waiting | None]


def waiting(observed: Observed, newest: Sequence[PodView]) -> Waiting:
    """What is waited for. Without a look at the pods only the Job's counters speak."""
    for question in QUESTIONS:
        if found := question(observed, newest):
            return found
    raise AssertionError("the last question always answers")


def _no_job(observed: Observed, _: Sequence[PodView]) -> Waiting | None:
    return Waiting("JobMissing", "the Job is being created") if observed.job is None else None


def _not_looked(observed: Observed, _: Sequence[PodView]) -> Waiting | None:
    if observed.pods is not None:
        return None
    assert observed.job is not None
    return Waiting("PodsStarting", f"waiting for {count(observed.job.nodes, 'pod')} to start")


def _bad_image(_: Observed, newest: Sequence[PodView]) -> Waiting | None:
    for pod in newest:
        reason, message = pod.waiting
        if reason in _IMAGE_REASONS:
            more = f": {as_sentence(message)}" if message else ""
            return Waiting(_image_reason(reason), f"pod {pod.name} cannot pull image {pod.image} ({reason}{more})")
    return None


def _image_reason(reason: str) -> str:
    """The two words that kubelet alternates between are one reason: it must not become an event each time."""
    return "ImagePullError" if reason in {"ErrImagePull", "ImagePullBackOff"} else reason


def _bad_configuration(_: Observed, newest: Sequence[PodView]) -> Waiting | None:
    for pod in newest:
        reason, message = pod.waiting
        if reason in _CONFIG_REASONS:
            return Waiting(reason, f"pod {pod.name} cannot start: {as_sentence(message) or reason}")
    return None


def _unschedulable(_: Observed, newest: Sequence[PodView]) -> Waiting | None:
    stuck = [pod for pod in newest if pod.unschedulable]
    if not stuck:
        return None
    others = f" (and {count(len(stuck) - 1, 'more pod')})" if len(stuck) > 1 else ""
    return Waiting(
        "Unschedulable", f"pod {stuck[0].name}{others} is not scheduled: {as_sentence(stuck[0].unschedulable)}"
    )


def _volume(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    if all(pod.started for pod in newest) and newest:
        return None
    return _complaint(observed, _VOLUME, "VolumeNotReady", "a volume is not ready")


def _quota(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    if not _pods_missing(observed, newest):
        return None
    return _complaint(observed, _QUOTA, "QuotaExceeded", "the namespace's quota does not allow the pods")


def _refused(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    if not _pods_missing(observed, newest):
        return None
    return _complaint(observed, _REFUSED, "PodsRefused", "the API server refuses the pods")


def _pods_missing(observed: Observed, newest: Sequence[PodView]) -> bool:
    """Whether an index has no pod, or one that is dead and not replaced."""
    assert observed.job is not None
    return sum(pod.phase != "Failed" for pod in newest) < observed.job.nodes


def _complaint(observed: Observed, pattern: re.Pattern[str], reason: str, words: str) -> Waiting | None:
    text = next((text for text in observed.complaints if pattern.search(text)), None)
    return Waiting(reason, f"{words}: {as_sentence(text)}") if text else None


def _no_pods(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    assert observed.job is not None
    if newest:
        return None
    return Waiting("NoPods", f"the Job {observed.job.name} has no pods yet{_newest_complaint(observed)}")


def _newest_complaint(observed: Observed) -> str:
    return f" ({as_sentence(observed.complaints[0])})" if observed.complaints else ""


def _leaving(_: Observed, newest: Sequence[PodView]) -> Waiting | None:
    names = [pod.name for pod in newest if pod.deleted is not None and not pod.ended]
    if not names:
        return None
    verb = "is" if len(names) == 1 else "are"
    them = "it" if len(names) == 1 else "them"
    return Waiting("PodsTerminating", f"{enumeration(names)} {verb} still ending; the Job replaces {them} afterwards")


def _replacing(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    assert observed.job is not None
    ended = [pod.name for pod in newest if pod.phase == "Failed"]
    if not ended and len(newest) >= observed.job.nodes:
        return None
    missing = observed.job.nodes - len(newest) + len(ended)
    why = _newest_complaint(observed)
    return Waiting("PodsMissing", f"the Job {observed.job.name} has not made {count(missing, 'pod')} yet{why}")


def _starting(_: Observed, newest: Sequence[PodView]) -> Waiting | None:
    preparing = [pod for pod in newest if not pod.started and not pod.ended and pod.node]
    if not preparing:
        return None
    names, nodes = [pod.name for pod in preparing], sorted({pod.node for pod in preparing})
    container = "the container" if len(names) == 1 else "the containers"
    if len(nodes) == 1:
        return Waiting("ContainerCreating", f"node {nodes[0]} prepares {container} of {enumeration(names)}")
    return Waiting("ContainerCreating", f"nodes {enumeration(nodes)} prepare {container} of {enumeration(names)}")


def _not_ready(observed: Observed, newest: Sequence[PodView]) -> Waiting | None:
    assert observed.job is not None
    names = [pod.name for pod in newest if not pod.ready]
    if not names:  # an attempt begins when the launchers have met
        few = observed.job.nodes == 1
        return Waiting("PodsStarting", f"{count(observed.job.nodes, 'pod')} {'runs' if few else 'run'}; {PREPARING}")
    return Waiting("PodsStarting", f"waiting for {enumeration(names)} to be ready")


QUESTIONS: tuple[Question, ...] = (
    _no_job,
    _not_looked,
    _bad_image,
    _bad_configuration,
    _unschedulable,
    _quota,
    _refused,
    _volume,
    _no_pods,
    _leaving,
    _replacing,
    _starting,
    _not_ready,
)
