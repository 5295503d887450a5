"""How a training process can end: one table of exit classes, codes and who can mend it.

The launcher exits with these codes; the operator's podFailurePolicy and the client read the same table.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Who can do something about an end; decides whether it is worth a restart."""

    NONE = "None"
    USER = "User"  # the same input fails again: never restarted
    INFRASTRUCTURE = "Infrastructure"  # worth a restart from the newest whole checkpoint
    INTERRUPTION = "Interruption"  # asked for from outside (SIGTERM, Ctrl-C)
    BUG = "Bug"  # ours: restarted within the budget, reported with its traceback


class ExitClass(StrEnum):
    """Every end of a launcher or rank process."""

    COMPLETED = "Completed"
    INVALID_SPEC = "InvalidSpec"
    INVALID_DATA = "InvalidData"
    INVALID_MODEL = "InvalidModel"
    SELF_CHECK_FAILED = "SelfCheckFailed"
    NUMERICAL_ERROR = "NumericalError"
    OUT_OF_MEMORY = "OutOfMemory"
    STORAGE_REFUSED = "StorageRefused"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    CHECKPOINT_UNUSABLE = "CheckpointUnusable"
    RANK_KILLED = "RankKilled"
    RENDEZVOUS_FAILED = "RendezvousFailed"
    COMMUNICATION_FAILED = "CommunicationFailed"
    INTERNAL_ERROR = "InternalError"
    INTERRUPTED = "Interrupted"

    @property
    def code(self) -> int:
        """The process's exit code."""
        return _TABLE[self][0]

    @property
    def cause(self) -> Cause:
        """Who can mend it."""
        return _TABLE[self][1]

    @property
    def meaning(self) -> str:
        """One sentence for the documentation."""
        return _TABLE[self][2]

    @property
    def restartable(self) -> bool:
        """Whether starting the same job again can end differently."""
        return self.cause in {Cause.INFRASTRUCTURE, Cause.BUG}

    @classmethod
    def from_code(cls, code: int) -> ExitClass:
        """The class of an exit code; a negative code or 128+N is a signal; anything unknown is a bug."""
        for exit_class, (known, _, _) in _TABLE.items():
            if known == code:
                return exit_class
        if code < 0 or code > 128:
            return cls.RANK_KILLED
        return cls.INTERNAL_ERROR


_TABLE: dict[ExitClass, tuple[int, Cause, str]] = {
    ExitClass.COMPLETED: (0, Cause.NONE, "Training finished and the artifact was verified in object storage."),
    ExitClass.INVALID_SPEC: (10, Cause.USER, "The manifest is invalid; every problem is listed."),
    ExitClass.INVALID_DATA: (11, Cause.USER, "The data set cannot be trained on; file and line are named."),
    ExitClass.INVALID_MODEL: (12, Cause.USER, "The base model cannot be loaded or trained as asked."),
    ExitClass.SELF_CHECK_FAILED: (13, Cause.USER, "What really runs differs from the plan (step-0 self-check)."),
    ExitClass.NUMERICAL_ERROR: (14, Cause.USER, "The loss or a gradient became NaN or infinite."),
    ExitClass.OUT_OF_MEMORY: (15, Cause.USER, "A device or the host ran out of memory."),
    ExitClass.STORAGE_REFUSED: (16, Cause.USER, "Object storage refused: credentials, bucket or URI."),
    ExitClass.CHECKPOINT_UNUSABLE: (17, Cause.USER, "No checkpoint can be used, or it was made from other input."),
    ExitClass.STORAGE_UNAVAILABLE: (30, Cause.INFRASTRUCTURE, "Object storage did not answer within the retry budget."),
    ExitClass.RANK_KILLED: (31, Cause.INFRASTRUCTURE, "A rank was killed by a signal from outside."),
    ExitClass.RENDEZVOUS_FAILED: (32, Cause.INFRASTRUCTURE, "The launchers did not find each other in time."),
    ExitClass.COMMUNICATION_FAILED: (
        33,
        Cause.INFRASTRUCTURE,
        "A collective failed or timed out because a peer was lost.",
    ),
    ExitClass.INTERNAL_ERROR: (70, Cause.BUG, "A defect of the trainer; the traceback is in the log."),
    ExitClass.INTERRUPTED: (143, Cause.INTERRUPTION, "Stopped by SIGTERM or Ctrl-C after writing a checkpoint."),
}
