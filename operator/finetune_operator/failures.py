"""What an end of an attempt means for the job: one table, cause -> restart or not, and from which budget.

A cause is an exit class of the trainer or a word of :class:`PodCause`. To change the policy, change the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from finetune_api.exits import Cause, ExitClass


class PodCause(StrEnum):
    """Ends that only Kubernetes knows about."""

    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    DRAINED = "Drained"
    NODE_LOST = "NodeLost"
    POD_DELETED = "PodDeleted"
    SUSPENDED = "Suspended"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    NODE_OUT_OF_MEMORY = "NodeOutOfMemory"
    OUT_OF_SPACE = "OutOfSpace"
    REJECTED = "Rejected"
    UNKNOWN = "Unknown"


class Budget(StrEnum):
    """Who pays for a restart."""

    NEVER = "Never"  # the same input fails again
    FAILURES = "Failures"  # runPolicy.maxRestarts
    DISRUPTIONS = (
        "Disruptions"  # the cluster's doing: not the job's fault, but a pod that is evicted for ever is not free
    )
    FREE = "Free"  # asked for by the job's owner


@dataclass(frozen=True)
class Policy:
    """``blame``: of several ends of one attempt the lowest caused the others. ``words``: "it failed because ..."."""

    budget: Budget
    blame: int
    words: str


ECHO = 2  # blame from which an end may have been caused by somebody else

_DISRUPTIONS_PER_RESTART = 10
_FEWEST_DISRUPTIONS = 10

POLICIES: Mapping[str, Policy] = {
    # what the owner or the cluster's clock asked for
    PodCause.SUSPENDED: Policy(Budget.FREE, -1, "the job was suspended"),
    PodCause.DEADLINE_EXCEEDED: Policy(Budget.NEVER, -1, "the job ran longer than runPolicy.activeDeadlineSeconds"),
    ExitClass.COMPLETED: Policy(Budget.FREE, 9, "training finished"),
    # the same input fails again: the launcher's sentence says what to change
    ExitClass.INVALID_SPEC: Policy(Budget.NEVER, 0, "the manifest is invalid"),
    ExitClass.INVALID_DATA: Policy(Budget.NEVER, 0, "the data set cannot be trained on"),
    ExitClass.INVALID_MODEL: Policy(Budget.NEVER, 0, "the base model cannot be loaded or trained as asked"),
    ExitClass.SELF_CHECK_FAILED: Policy(Budget.NEVER, 0, "what really ran differed from the plan"),
    ExitClass.NUMERICAL_ERROR: Policy(Budget.NEVER, 0, "the loss or a gradient became NaN or infinite"),
    ExitClass.OUT_OF_MEMORY: Policy(Budget.NEVER, 0, "a device or the container ran out of memory"),
    PodCause.OUT_OF_SPACE: Policy(Budget.NEVER, 0, "a pod wrote more than its scratch space or shared memory holds"),
    ExitClass.STORAGE_REFUSED: Policy(Budget.NEVER, 0, "object storage refused"),
    ExitClass.CHECKPOINT_UNUSABLE: Policy(
        Budget.NEVER, 0, "no checkpoint can be used, or it was made from other input"
    ),
    # infrastructure that may be better next time, within the owner's patience
    ExitClass.RANK_KILLED: Policy(Budget.FAILURES, 0, "a process was killed"),
    ExitClass.STORAGE_UNAVAILABLE: Policy(Budget.FAILURES, 0, "object storage did not answer"),
    PodCause.NODE_OUT_OF_MEMORY: Policy(Budget.FAILURES, 0, "the node ran out of memory"),
    ExitClass.INTERNAL_ERROR: Policy(Budget.FAILURES, 2, "the trainer met a defect of its own"),
    ExitClass.RENDEZVOUS_FAILED: Policy(Budget.FAILURES, 3, "the launchers did not find each other"),
    ExitClass.COMMUNICATION_FAILED: Policy(Budget.FAILURES, 3, "a peer was lost"),
    PodCause.UNKNOWN: Policy(Budget.FAILURES, 3, "it ended between two looks and nobody could say why"),
    # what the cluster did
    PodCause.PREEMPTED: Policy(Budget.DISRUPTIONS, 0, "a pod was preempted by one of higher priority"),
    PodCause.EVICTED: Policy(Budget.DISRUPTIONS, 0, "a pod was evicted from its node"),
    PodCause.DRAINED: Policy(Budget.DISRUPTIONS, 0, "a pod was evicted because its node is drained"),
    PodCause.REJECTED: Policy(Budget.DISRUPTIONS, 0, "a node did not admit a pod that was scheduled to it"),
    PodCause.NODE_LOST: Policy(Budget.DISRUPTIONS, 0, "a node was lost"),
    PodCause.POD_DELETED: Policy(Budget.DISRUPTIONS, 1, "a pod was deleted"),
    ExitClass.INTERRUPTED: Policy(Budget.DISRUPTIONS, 2, "a pod was stopped from outside"),
}


def policy(cause: str) -> Policy:
    """The row of ``cause``; a cause of another version of the operator counts as unknown."""
    return POLICIES.get(cause, POLICIES[PodCause.UNKNOWN])


@dataclass(frozen=True)
class Spent:
    """A budget that is used up."""

    reason: str
    allowed: int
    used: int
    words: str


def allowed_disruptions(max_restarts: int) -> int:
    """Disruptions do not count against ``maxRestarts``, but each costs a start: ten for every restart allowed."""
    return max(_FEWEST_DISRUPTIONS, _DISRUPTIONS_PER_RESTART * max_restarts)


def spent(restarts: Mapping[str, int], max_restarts: int) -> Spent | None:
    """The budget that the ended attempts (by cause) have used up, if one is."""
    failures = sum(number for cause, number in restarts.items() if policy(cause).budget == Budget.FAILURES)
    if failures > max_restarts:
        return Spent("RestartBudgetExceeded", max_restarts, failures, "runPolicy.maxRestarts")
    disruptions = sum(number for cause, number in restarts.items() if policy(cause).budget == Budget.DISRUPTIONS)
    allowed = allowed_disruptions(max_restarts)
    if disruptions > allowed:
        return Spent("DisruptionBudgetExceeded", allowed, disruptions, "ten disruptions per allowed restart")
    return None


def is_user_error(cause: str) -> bool:
    """Whether only the owner of the job can mend it."""
    return policy(cause).budget == Budget.NEVER


def is_trainer_word(cause: str) -> bool:
    """Whether the trainer itself said so."""
    return cause in set(ExitClass) and ExitClass(cause).cause != Cause.NONE
