"""Best-fit-decreasing bin packing: samples to rows, none split, none left out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def pack(lengths: NDArray[np.integer], capacity: int) -> tuple[IntArray, IntArray]:
    """Places every item once in a row of at most ``capacity`` tokens; deterministic.

    Returns ``(items, row_offsets)``: row r holds ``items[row_offsets[r]:row_offsets[r + 1]]``. Items are taken longest
    first and each goes to the fullest row it fits in (Johnson 1974: at most 11/9 of the optimum plus one). Rows
    are found through a two-level bitmap over free space, so the cost per item does not grow with the number of rows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"an item of {int(lengths.max())} tokens does not fit into {capacity}")
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows with exactly that much
    free = _FreeSpace(capacity)
    for item in np.argsort(-lengths, kind="stable"):
        size = int(lengths[item])
        space = free.smallest_at_least(size)
        if space is None:
            rows.append([])
            row, space = len(rows) - 1, capacity
        else:
            row = open_rows[space].pop()
            if not open_rows[space]:
                free.remove(space)
        rows[row].append(int(item))
        left = space - size
        if left:
            open_rows.setdefault(left, []).append(row)
            free.add(left)
    sizes = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    items = np.fromiter((item for row in rows for item in row), dtype=np.int64, count=len(lengths))
    return items, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def one_per_row(count: int) -> tuple[IntArray, IntArray]:
    """The same shape as ``pack`` without packing."""
    return np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64)


class _FreeSpace:
    """The set of free spaces that some row has: a two-level bitmap answers "smallest one >= size"."""

    def __init__(self, capacity: int) -> None:
        self._words = [0] * (capacity // 64 + 1)
        self._summary = 0  # bit w: word w is not empty

    def add(self, space: int) -> None:
        self._words[space >> 6] |= 1 << (space & 63)
        self._summary |= 1 << (space >> 6)

    def remove(self, space: int) -> None:
        word = space >> 6
        self._words[word] &= ~(1 << (space & 63))
        if not self._words[word]:
            self._summary &= ~(1 << word)

    def smallest_at_least(self, size: int) -> int | None:
        word = size >> 6
        if word >= len(self._words):
            return None
        here = self._words[word] >> (size & 63)
        if here:
            return size + (here & -here).bit_length() - 1
        above = self._summary >> (word + 1)
        if not above:
            return None
        word += (above & -above).bit_length()
        bits = self._words[word]
        return (word << 6) + (bits & -bits).bit_length() - 1
