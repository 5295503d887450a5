"""Numbers, times and lists as people write them, and texts cut to their bounds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from finetune_api.exits import ExitClass

MESSAGE_LENGTH = 1024  # of a status message or an event
ATTEMPT_LENGTH = 512  # of one line of the ledger
CONDITION_LENGTH = 32_768  # of a condition's message, as Kubernetes bounds it


def cut(text: str, length: int = MESSAGE_LENGTH) -> str:
    """``text`` on one line, at most ``length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def time_text(moment: datetime) -> str:
    """RFC 3339 in whole seconds, as Kubernetes writes times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def unix_time(seconds: float) -> datetime | None:
    """Unix seconds as a moment; 0 means unknown."""
    return datetime.fromtimestamp(seconds, UTC) if seconds > 0 else None


def decimal(value: float | None, digits: int = 4) -> str | None:
    """A number as status text with ``digits`` significant ones: a status has no floats."""
    if value is None:
        return None
    text = f"{value:.{digits}g}"
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def duration(seconds: float) -> str:
    """About how long, in the unit that people would choose."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def count(number: int, noun: str) -> str:
    """``1 pod``, ``2 pods``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def enumeration(names: Sequence[str], most: int = 3) -> str:
    """``a``, ``a and b``, ``a, b and c``, ``a, b, c and 4 more``."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def listed(lines: Sequence[str], length: int = CONDITION_LENGTH) -> str:
    """One below the other, as many as ``length`` characters hold; the last line then says how many are left out."""
    text = "\n".join(lines)
    if len(text) <= length:
        return text
    if len(lines) == 1:
        return text[: length - 3] + "..."
    kept, used = 0, len(_left_out(len(lines)))
    while used + len(lines[kept]) + 1 <= length:
        used += len(lines[kept]) + 1
        kept += 1
    return "\n".join((*lines[:kept], _left_out(len(lines) - kept)))


def _left_out(number: int) -> str:
    return f"... and {number:,} more"


def meaning(exit_class: ExitClass) -> str:
    """What an exit class means, without the full stop."""
    return exit_class.meaning.rstrip(".")


def as_sentence(text: str) -> str:
    """Without a full stop at the end: a hint or a cause may follow."""
    return cut(text, 800).rstrip(". ")
