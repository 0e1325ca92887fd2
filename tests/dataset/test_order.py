"""The order of the samples is computed where it is asked for, at any scale, and never changes."""

import resource

import numpy as np
import pytest

from sitdist.dataset.order import WINDOW, BlockShuffle

# Of format version 1's reader, which held the indexes of all shards.
KNOWN_START = [57, 51, 30, 20, 48, 10, 68, 74, 71, 50]
KNOWN_SECOND_EPOCH = [75, 15, 48, 21, 7, 49, 50, 20, 64, 18]
KNOWN_OF_A_BILLION = [758718836, 899740002]


def test_the_order_is_the_one_that_earlier_runs_were_trained_with():
    order = BlockShuffle([4] * 19 + [1], seed=0)  # 77 samples
    assert order.samples(np.arange(10)).tolist() == KNOWN_START
    assert order.samples(np.arange(77, 87)).tolist() == KNOWN_SECOND_EPOCH


def test_positions_may_be_asked_for_in_any_order_and_across_epochs():
    counts = [7, 1, 9, 2] * 6
    straight = BlockShuffle(counts, 3).samples(np.arange(3 * sum(counts)))
    positions = np.random.default_rng(0).permutation(3 * sum(counts))
    assert np.array_equal(BlockShuffle(counts, 3).samples(positions), straight[positions])
    one_by_one = BlockShuffle(counts, 3)
    assert [one_by_one.samples(np.asarray([p])).item() for p in positions[:40]] == straight[positions[:40]].tolist()


def test_a_billion_samples_need_memory_for_a_window_only():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    order = BlockShuffle([10_000] * 100_000, seed=0)
    window = order.samples(np.arange(10**9, 10**9 + 80_000))  # the first of the second epoch
    assert order.samples(np.asarray([10**9 - 1, 256 * 10**6])).tolist() == KNOWN_OF_A_BILLION
    assert len(set(window.tolist())) == 80_000
    assert sorted(set((window // 10_000).tolist())) == sorted(order.shards(1, 0))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MB
    assert grown < 200  # a permutation of a billion would be 8,000


def test_windows_follow_each_other_through_the_epochs():
    order = BlockShuffle([2] * (2 * WINDOW + 1), seed=1)
    epoch = len(order)
    assert order.windows(np.arange(epoch + 1)) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    window, seen = (0, 0), []
    for _ in range(3):
        seen += order.shards(*window)
        window = order.window_after(*window)
    assert sorted(seen) == list(range(2 * WINDOW + 1))
    assert window == (1, 0)


@pytest.mark.parametrize("position", [0, 30, 77 * 5 + 20])
def test_a_replacement_is_of_the_same_window_and_another_for_every_attempt(position):
    order = BlockShuffle([4] * 19 + [1], seed=0)
    ((epoch, window),) = order.windows(np.asarray([position]))
    drawn = [order.replacement(position, attempt) for attempt in range(50)]
    assert {index // 4 for index in drawn} <= set(order.shards(epoch, window))
    assert len(set(drawn)) > 10
    assert drawn == [BlockShuffle([4] * 19 + [1], seed=0).replacement(position, attempt) for attempt in range(50)]
    assert drawn != [BlockShuffle([4] * 19 + [1], seed=1).replacement(position, attempt) for attempt in range(50)]
