"""Packing, the stream of rows, dealing and joining: properties that hold for any lengths."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.data import Sample, SampleStream, collate, deal
from finetune_trainer.data.packing import one_per_row, pack

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=120)


@given(LENGTHS)
def test_packing_keeps_every_sample_exactly_once_and_never_exceeds_the_length(lengths: list[int]) -> None:
    items, offsets = pack(np.array(lengths), 200)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in items[a:b]) for a, b in itertools.pairwise(offsets)]
    assert max(sizes) <= 200
    assert min(sizes) >= 1


@given(LENGTHS)
def test_packing_chooses_the_fullest_row_that_fits(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        free = [200 - sum(lengths[i] for i in row) for row in rows]
        fitting = [space for space in free if space >= lengths[item]]
        if fitting:
            row = max(r for r, space in enumerate(free) if space == min(fitting))
            rows[row].append(item)
        else:
            rows.append([item])
    items, offsets = pack(np.array(lengths), 200)
    assert len(offsets) - 1 == len(rows)
    free_space = sorted(200 - sum(lengths[i] for i in items[a:b]) for a, b in itertools.pairwise(offsets))
    assert free_space == sorted(200 - sum(lengths[i] for i in row) for row in rows)


def test_packing_refuses_an_item_that_is_too_long() -> None:
    with pytest.raises(ValueError, match="an item of 9 tokens does not fit into 8"):
        pack(np.array([3, 9]), 8)


def test_packing_nothing_gives_no_rows() -> None:
    items, offsets = pack(np.array([], dtype=np.int64), 8)
    assert (items.tolist(), offsets.tolist()) == ([], [0])


def test_one_row_per_sample_without_packing() -> None:
    items, offsets = one_per_row(3)
    assert (items.tolist(), offsets.tolist()) == ([0, 1, 2], [0, 1, 2, 3])


@given(LENGTHS, st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None)
def test_the_stream_covers_each_epoch_exactly_once(lengths: list[int], batch: int, group: bool, seed: int) -> None:
    stream = SampleStream(np.array(lengths), seed, batch, group)
    rows, epochs = len(lengths), 3
    steps = -(-epochs * rows // batch)
    seen = np.concatenate([stream.batch(step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


@given(LENGTHS, st.integers(1, 40), st.booleans())
@settings(deadline=None)
def test_any_step_of_the_stream_can_be_asked_for_first(lengths: list[int], batch: int, group: bool) -> None:
    walked = SampleStream(np.array(lengths), 7, batch, group)
    batches = [walked.batch(step).tolist() for step in range(9)]
    assert SampleStream(np.array(lengths), 7, batch, group).batch(8).tolist() == batches[8]


def test_seed_and_epoch_change_the_order() -> None:
    lengths = np.ones(100, dtype=np.int64)
    stream = SampleStream(lengths, 0, 100)
    assert stream.batch(0).tolist() != stream.batch(1).tolist()
    assert stream.batch(0).tolist() != SampleStream(lengths, 1, 100).batch(0).tolist()
    assert stream.batch(0).tolist() == SampleStream(lengths, 0, 100).batch(0).tolist()


def split_mix(value: int) -> int:
    """SplitMix64 with Python's integers."""
    word = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & word
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
    return value ^ (value >> 31)


def test_the_order_is_a_promise_and_does_not_change_between_releases() -> None:
    base = split_mix(split_mix(42) ^ 1)
    keys = [split_mix((base + index * 0x9E3779B97F4A7C15) % 2**64) for index in range(10)]
    expected = sorted(range(10), key=keys.__getitem__)
    assert SampleStream(np.ones(10), 42, 10).batch(1).tolist() == expected


def test_the_order_does_not_depend_on_the_global_batch_size() -> None:
    lengths = np.ones(24, dtype=np.int64)
    small = np.concatenate([SampleStream(lengths, 3, 4).batch(step) for step in range(12)])
    large = np.concatenate([SampleStream(lengths, 3, 16).batch(step) for step in range(3)])
    assert small.tolist() == large.tolist()


def test_grouping_by_length_makes_batches_of_like_length_inside_a_window() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    plain = SampleStream(lengths, 0, 8)
    grouped = SampleStream(lengths, 0, 8, group_by_length=True)

    def spread(stream: SampleStream) -> float:
        return float(np.mean([np.ptp(lengths[stream.batch(step)]) for step in range(500)]))

    assert spread(grouped) < spread(plain) / 10
    for window in range(10):  # rows stay inside their window of 50 batches
        steps = range(window * 50, (window + 1) * 50)
        ours = np.concatenate([grouped.batch(step) for step in steps])
        theirs = np.concatenate([plain.batch(step) for step in steps])
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    firsts = [float(lengths[grouped.batch(step)].mean()) for step in range(50)]
    assert firsts != sorted(firsts)  # batches of a window are shuffled


@given(
    st.lists(st.integers(1, 5000), min_size=64, max_size=64),
    st.sampled_from([(1, 1), (1, 64), (2, 4), (4, 2), (8, 8), (4, 16)]),
)
def test_dealing_partitions_the_batch_over_any_world(lengths: list[int], shape: tuple[int, int]) -> None:
    world, micro = shape
    indices = np.random.default_rng(1).permutation(64)
    dealt = deal(indices, np.array(lengths), world, micro)
    assert len(dealt) == world
    assert {len(rank) for rank in dealt} == {64 // (world * micro)}
    assert {len(part) for rank in dealt for part in rank} == {micro}
    assert sorted(np.concatenate([part for rank in dealt for part in rank]).tolist()) == list(range(64))


def test_dealing_balances_tokens_over_ranks_and_micro_batches() -> None:
    lengths = np.random.default_rng(0).integers(10, 2000, 256)
    dealt = deal(np.arange(256), lengths, 4, 8)
    by_rank = [sum(int(lengths[part].sum()) for part in rank) for rank in dealt]
    by_micro = [int(lengths[part].sum()) for rank in dealt for part in rank]
    assert max(by_rank) / min(by_rank) < 1.005
    assert max(by_micro) / min(by_micro) < 1.05


def test_dealing_single_rows_runs_rows_of_like_length_at_the_same_time() -> None:
    lengths = np.array([100, 1, 99, 2, 50, 51, 3, 98])
    dealt = deal(np.arange(8), lengths, 2, 1)
    pairs = [sorted(int(lengths[dealt[rank][step][0]]) for rank in range(2)) for step in range(4)]
    assert pairs == [[99, 100], [51, 98], [3, 50], [1, 2]]


def test_the_end_of_a_validation_set_fills_some_micro_batches_only() -> None:
    dealt = deal(np.array([5, 6, 7]), np.full(8, 4), 2, 4)
    assert [len(rank) for rank in dealt] == [1, 1]
    assert sorted(np.concatenate([dealt[0][0], dealt[1][0]]).tolist()) == [5, 6, 7]
    assert [len(part) for rank in deal(np.array([5]), np.full(8, 4), 2, 4) for part in rank] == [1, 0]


def test_dealing_a_large_validation_set_takes_moments() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 200_000)
    started = time.monotonic()
    dealt = deal(np.arange(200_000), lengths, 8, 2)
    assert time.monotonic() - started < 20  # a search through all micro-batches would take hours
    assert sum(len(part) for rank in dealt for part in rank) == 200_000


def test_joined_rows_restart_their_positions_and_keep_their_segments() -> None:
    first = Sample(np.array([1, 2, 3], np.int32), np.array([-100, 2, 3], np.int32), np.array([2, 1], np.int32))
    second = Sample(np.array([4, 5], np.int32), np.array([-100, 5], np.int32), np.array([2], np.int32))
    batch = collate([first, second])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 1]]
    assert batch.cumulative_lengths.tolist() == [0, 2, 3, 5]
    assert batch.longest_segment == 2
    assert str(batch.input_ids.dtype) == "torch.int64"
    assert str(batch.cumulative_lengths.dtype) == "torch.int32"
