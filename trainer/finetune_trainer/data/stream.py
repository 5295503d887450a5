"""Which rows an optimizer step sees: a pure function of (seed, epoch, index), whatever the world size."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GROUPING_WINDOW = 50  # global batches whose rows may be regrouped by length

IntArray = NDArray[np.int64]


class SampleStream:
    """Concatenates one permutation of all rows per epoch; a global batch may straddle two epochs, nothing is dropped.

    With ``group_by_length`` the rows of up to 50 global batches of one epoch are sorted by length, cut into global
    batches and these are shuffled: a batch holds rows of like length, and each epoch still covers every row once.
    """

    def __init__(
        self, lengths: NDArray[np.integer], seed: int, global_batch_size: int, group_by_length: bool = False
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("a stream needs at least one row")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._seed = seed
        self._batch = global_batch_size
        self._group = group_by_length
        self.order = lru_cache(maxsize=2)(self._order)  # of one epoch: (N,) row indices

    def __len__(self) -> int:
        return len(self._lengths)

    def batch(self, step: int) -> IntArray:
        """Row indices (global_batch_size,) of 0-based optimizer step ``step``."""
        first, rows = step * self._batch, len(self._lengths)
        parts, wanted = [], self._batch
        while wanted:
            epoch, index = divmod(first, rows)
            part = self.order(epoch)[index : index + wanted]
            parts.append(part)
            first, wanted = first + len(part), wanted - len(part)
        return np.concatenate(parts)

    def _order(self, epoch: int) -> IntArray:
        rows = np.argsort(_keys(self._seed, epoch, len(self._lengths)), kind="stable")
        return self._grouped(rows, epoch) if self._group else rows

    def _grouped(self, rows: IntArray, epoch: int) -> IntArray:
        """Regroups so that chunks fall together with the stream's global batches."""
        batch = self._batch
        head = -(epoch * len(rows)) % batch  # completes the batch that the epoch before began
        whole = head + max(len(rows) - head, 0) // batch * batch  # the rest begins the next epoch's first batch
        parts = [rows[:head]]
        for number, start in enumerate(range(head, whole, GROUPING_WINDOW * batch)):
            window = rows[start : min(start + GROUPING_WINDOW * batch, whole)]
            chunks = window[np.argsort(self._lengths[window], kind="stable")].reshape(-1, batch)
            keys = _keys(self._seed ^ (number + 1), -1 - epoch, len(chunks))
            parts.append(chunks[np.argsort(keys, kind="stable")].reshape(-1))
        return np.concatenate([*parts, rows[whole:]])


def _keys(seed: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """One pseudo-random 64-bit key per index: SplitMix64 (Steele et al. 2014) over (seed, epoch, index)."""
    base = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    base = _mix(base ^ np.array([epoch & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    return _mix(base + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
