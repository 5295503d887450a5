"""The nearest known name, for 'did you mean'."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name`` by edits (case and separators do not count), or ``None`` if none is close."""
    wanted = _plain(name)
    ranked = sorted((_distance(wanted, _plain(candidate)), candidate) for candidate in known)
    if not ranked:
        return None
    distance, best = ranked[0]
    contained = len(wanted) >= 4 and (wanted in _plain(best) or _plain(best) in wanted)
    return best if distance <= max(1, len(wanted) // 3) or contained else None


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")[:64]


def _distance(left: str, right: str) -> int:
    """Optimal string alignment distance: insert, delete, replace, swap neighbours."""
    before_previous: list[int] = []
    previous = list(range(len(right) + 1))
    for row, a in enumerate(left, 1):
        current = [row]
        for column, b in enumerate(right, 1):
            best = min(previous[column] + 1, current[column - 1] + 1, previous[column - 1] + (a != b))
            if row > 1 and column > 1 and a == right[column - 2] and left[row - 2] == b:
                best = min(best, before_previous[column - 2] + 1)
            current.append(best)
        before_previous, previous = previous, current
    return previous[-1]
