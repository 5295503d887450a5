"""The launcher's last word: a Termination in JSON that fits into a pod's termination message (4 KiB)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from finetune_api.errors import FineTuneError
from finetune_api.exits import Cause, ExitClass
from finetune_api.plan import Plan
from finetune_api.report import Heartbeat, JobResult, Termination
from finetune_trainer.failures import Outcome

MAXIMUM_BYTES = 4096
_SECRET_NAME = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|_KEY$|ACCESS_KEY|SAS)", re.IGNORECASE)
_SHORTEST_SECRET = 8
_SHORTENED = (("message", 600), ("hint", 300), ("exception", 100), ("message", 200), ("hint", 100))


def completed(result: JobResult | None, plan: Plan | None) -> Termination:
    """All ranks completed. ``result`` comes from the node that has rank 0; other nodes have none."""
    if result is None:
        return _ended(ExitClass.COMPLETED, "this node completed; the node with rank 0 reports the artifact")
    return Termination(
        exit_class=ExitClass.COMPLETED,
        exit_code=ExitClass.COMPLETED.code,
        message=f"completed after {result.step} steps: {result.artifact_files} files at {result.artifact_uri}",
        step=result.step,
        artifact_uri=result.artifact_uri,
        artifact_manifest_sha256=result.artifact_manifest_sha256,
        artifact_files=result.artifact_files,
        artifact_bytes=result.artifact_bytes,
        metrics=result.metrics,
        plan=plan,
    )


def failed(outcome: Outcome, plan: Plan | None, heartbeats: Mapping[int, Heartbeat]) -> Termination:
    """The ranks failed for good, or were stopped from outside."""
    guilty = outcome.guilty
    checkpoint = newest_checkpoint(heartbeats)
    said = guilty.message if guilty else ""
    message = _interrupted(outcome, checkpoint) if outcome.exit_class.cause == Cause.INTERRUPTION else said
    step = guilty.step if guilty else max((end.step for end in outcome.ends.values()), default=None)
    return Termination(
        exit_class=outcome.exit_class,
        exit_code=outcome.exit_class.code,
        message=message,
        hint=guilty.hint if guilty else "",
        guilty_rank=guilty.rank if guilty else None,
        phase=guilty.phase if guilty else None,
        step=step,
        exception=guilty.exception if guilty else "",
        last_lines=guilty.last_lines if guilty else (),
        checkpoint_step=checkpoint.checkpoint_step if checkpoint else None,
        checkpoint_uri=checkpoint.checkpoint_uri if checkpoint else None,
        checkpoint_saved_at=checkpoint.checkpoint_saved_at if checkpoint else None,
        plan=plan,
    )


def refused(error: BaseException) -> Termination:
    """The launcher itself ended by an error, before or between attempts."""
    if isinstance(error, FineTuneError):
        return _ended(error.exit_class, str(error), error.hint)
    name = type(error).__name__
    ended = _ended(
        ExitClass.INTERNAL_ERROR, f"defect in the launcher: {name}: {error}", "see the traceback in the launcher's log"
    )
    return ended.model_copy(update={"exception": name})


def interrupted_early(phase: str) -> Termination:
    """SIGTERM or Ctrl-C before any rank had started."""
    return _ended(ExitClass.INTERRUPTED, f"stopped while the launcher was in phase {phase}; nothing is lost")


def newest_checkpoint(heartbeats: Mapping[int, Heartbeat]) -> Heartbeat | None:
    """The heartbeat that names the newest checkpoint written in this attempt."""
    named = [beat for beat in heartbeats.values() if beat.checkpoint_step is not None]
    return max(named, key=lambda beat: beat.checkpoint_step or 0, default=None)


def _interrupted(outcome: Outcome, checkpoint: Heartbeat | None) -> str:
    parts = ["stopped from outside"]
    if outcome.killed:
        ranks = ", ".join(str(rank) for rank in outcome.killed)
        parts.append(f"rank(s) {ranks} did not end within the grace period and were killed")
    if outcome.guilty is not None and outcome.guilty.exit_class.cause != Cause.INTERRUPTION:
        parts.append(f"rank {outcome.guilty.rank} failed while stopping ({outcome.guilty.message})")
    if checkpoint is not None:
        parts.append(f"the newest checkpoint is of step {checkpoint.checkpoint_step}")
    else:
        parts.append("no checkpoint was written by this run")
    return "; ".join(parts)


def _ended(exit_class: ExitClass, message: str, hint: str = "") -> Termination:
    return Termination(exit_class=exit_class, exit_code=exit_class.code, message=message, hint=hint)


def encode(termination: Termination, environment: Mapping[str, str] = os.environ) -> bytes:
    """At most 4096 bytes of JSON. Dropped in this order: the plan, last lines but five, earlier attempts from the
    oldest, the other last lines, ends of long texts.

    Values of environment variables that are named like secrets do not appear.
    """
    termination = _redacted(termination, environment)
    if len(text := _dump(termination)) <= MAXIMUM_BYTES:
        return text
    termination = termination.model_copy(update={"plan": None})
    termination = _fewer_lines(termination, least=5)
    while len(_dump(termination)) > MAXIMUM_BYTES and len(termination.ended) > 1:
        termination = termination.model_copy(update={"ended": termination.ended[1:]})
    termination = _fewer_lines(termination, least=0)
    text = _dump(termination)
    for field, length in _SHORTENED:
        if len(text) <= MAXIMUM_BYTES:
            break
        termination = termination.model_copy(update={field: _cut(getattr(termination, field), length)})
        text = _dump(termination)
    return text


def _fewer_lines(termination: Termination, least: int) -> Termination:
    """Without its oldest last lines, as many as it takes; the very last one is shortened first."""
    while len(_dump(termination)) > MAXIMUM_BYTES and len(termination.last_lines) > least:
        first, *rest = termination.last_lines
        kept = (*rest,) if rest else (_cut(first, len(first) // 2),) if len(first) > 80 else ()
        termination = termination.model_copy(update={"last_lines": tuple(kept)})
    return termination


def write(path: Path, termination: Termination) -> None:
    """Write the message where kubelet (or the client) reads it. In a pod the file exists and cannot be replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(termination))


def _dump(termination: Termination) -> bytes:
    return termination.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=True).encode()


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _redacted(termination: Termination, environment: Mapping[str, str]) -> Termination:
    secrets = [
        value for name, value in environment.items() if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name)
    ]

    def clean(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, "***")
        return text

    return termination.model_copy(
        update={
            "message": clean(termination.message),
            "hint": clean(termination.hint),
            "ended": tuple(end.model_copy(update={"message": clean(end.message)}) for end in termination.ended),
            "last_lines": tuple(clean(line) for line in termination.last_lines),
        }
    )
