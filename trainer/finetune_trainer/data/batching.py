"""From row indices to what a rank computes on: dealing a global batch over ranks, joining rows without padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from finetune_trainer.data.dataset import Sample

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A micro-batch: all segments of all its rows in one sequence of T tokens, no padding."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, restarts at 0 in each segment
    labels: torch.Tensor  # (1, T) int64, -100: no loss; not shifted
    cumulative_lengths: torch.Tensor  # (S + 1,) int32, segment s is tokens [s] to [s + 1]
    longest_segment: int


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins rows into one micro-batch."""
    segments = np.concatenate([sample.segment_lengths for sample in samples]).astype(np.int64)  # (S,)
    ends = np.cumsum(segments)
    starts = np.repeat(ends - segments, segments)  # (T,) start of each token's segment
    return Batch(
        input_ids=_row([sample.input_ids for sample in samples]),
        position_ids=torch.from_numpy(np.arange(len(starts)) - starts).unsqueeze(0),
        labels=_row([sample.labels for sample in samples]),
        cumulative_lengths=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        longest_segment=int(segments.max()),
    )


def deal(
    indices: IntArray, lengths: NDArray[np.integer], world_size: int, micro_batch_size: int
) -> list[list[IntArray]]:
    """Deals a global batch: ``result[rank][micro]`` are row indices, every rank has the same number of micro-batches.

    ``lengths`` are the data set's (``dataset.lengths``), looked up by row index. Long rows are placed first, each into
    the lightest micro-batch that has room; micro-batches of like weight then run in the same step of every rank, so
    that ranks wait little for each other. When the rows do not fill ``world_size * micro_batch_size`` slots (the end of
    a validation set) micro-batches are smaller, and empty where there are fewer rows than micro-batches.
    """
    steps = -(-len(indices) // (world_size * micro_batch_size))
    weights = np.asarray(lengths)[indices]
    bins: list[list[int]] = [[] for _ in range(steps * world_size)]
    loads = np.zeros(len(bins), dtype=np.int64)
    with_room = [(0, number) for number in range(len(bins))]  # a heap of (load, micro-batch)
    for position in np.argsort(-weights, kind="stable"):
        load, lightest = heapq.heappop(with_room)
        bins[lightest].append(int(position))
        loads[lightest] = load + int(weights[position])
        if len(bins[lightest]) < micro_batch_size:
            heapq.heappush(with_room, (int(loads[lightest]), lightest))
    heaviest_first = np.argsort(-loads, kind="stable").reshape(steps, world_size)
    dealt: list[list[IntArray]] = [[] for _ in range(world_size)]
    totals = np.zeros(world_size, dtype=np.int64)
    for step in heaviest_first:
        for rank, chosen in zip(np.argsort(totals, kind="stable"), step, strict=True):  # lightest rank, heaviest bin
            dealt[rank].append(indices[np.array(sorted(bins[chosen]), dtype=np.int64)])
            totals[rank] += loads[chosen]
    return dealt


def _row(parts: Sequence[NDArray[np.int32]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).unsqueeze(0)
