"""Reading ahead changes when a batch is read, never what it holds."""

import re
import threading
import time

import pytest
import torch

from sitdist.dataset import prefetch as prefetching
from sitdist.dataset.batches import BatchReader
from sitdist.dataset.prefetch import Prefetch
from sitdist.dataset.reader import ShardReader
from sitdist.errors import DataError


class Slow:
    """Batches that say which they are and take a while; step 5 is damaged."""

    def __init__(self, seconds=0.0):
        self.seconds, self.asked = seconds, []

    def batch(self, step, rank, world):
        self.asked.append(step)
        time.sleep(self.seconds)
        if step == 5:
            raise DataError("sample 5: altered bytes")
        return step

    def reading(self):
        return ["train/000000.tar"]


def test_what_reads_ahead_computes_in_one_thread_and_leaves_the_others_theirs(tiny_dataset):
    class Asked(BatchReader):
        def batch(self, step, rank, world):
            self.threads = torch.get_num_threads()
            return super().batch(step, rank, world)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        asked = Asked(ShardReader(tiny_dataset, "train"), 0, 4)
        prefetch = Prefetch(asked, 0, 1, stop=4)
        prefetch.batch(0)
        prefetch.close()
        assert (asked.threads, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_the_order_in_which_they_are_asked_for(tiny_dataset, workers):
    reader = BatchReader(ShardReader(tiny_dataset, "train"), 0, 16)
    prefetch = Prefetch(reader, 1, 2, 1000, workers)
    for step in (*range(10), 3, 4, 700, 701):
        batch, _ = prefetch.batch(step)
        alone = reader.batch(step, 1, 2)
        assert batch.keys == alone.keys
        assert torch.equal(batch.moments, alone.moments)
    prefetch.close()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_as_many_steps_as_threads_are_read_ahead_and_none_after_the_last(workers):
    reader = Slow()
    prefetch = Prefetch(reader, 0, 1, 5, workers)
    assert [prefetch.batch(0)[0]] == [0]
    prefetch.close()
    assert set(reader.asked) <= set(range(workers + 1))
    reader = Slow()
    prefetch = Prefetch(reader, 0, 1, 5, workers)
    assert [prefetch.batch(step)[0] for step in range(5)] == [0, 1, 2, 3, 4]
    prefetch.close()
    assert sorted(reader.asked) == [0, 1, 2, 3, 4]  # each once, and never 5


def test_damage_is_told_at_the_step_it_belongs_to():
    prefetch = Prefetch(Slow(), 0, 1, 10, workers=2)
    assert [prefetch.batch(step)[0] for step in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="sample 5"):
        prefetch.batch(5)
    prefetch.close()


def test_more_threads_wait_less():
    waited = {}
    for workers in (1, 4):
        prefetch = Prefetch(Slow(0.05), 0, 1, 5, workers)
        waited[workers] = sum(prefetch.batch(step)[1] for step in range(5))
        prefetch.close()
    assert waited[4] < 0.75 * waited[1]  # 2 rounds of 0.05 s instead of 5


def test_a_reader_that_stalls_is_told_with_the_shard_it_waits_for(tiny_dataset, monkeypatch):
    said, go_on = [], threading.Event()

    def say(message, *values):
        said.append(message % values)
        go_on.set()

    monkeypatch.setattr(prefetching, "STALLED", 0.05)
    monkeypatch.setattr(prefetching.log, "warning", say)
    shards = ShardReader(tiny_dataset, "train")
    open_shard = shards._open_shard
    monkeypatch.setattr(shards, "_open", lambda number: (go_on.wait(20), open_shard(number))[1])  # a disk that hangs
    reader = BatchReader(shards, 0, 4)
    prefetch = Prefetch(reader, 0, 1, 1)
    batch, waited = prefetch.batch(0)
    prefetch.close()
    assert len(batch.keys) == 4
    assert waited >= 0.05
    assert re.fullmatch(rf"rank 0: no data for step 0 after \d s; it waits for {tiny_dataset}/train/\S+\.tar", said[0])
    assert shards.reading() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_on_the_gpu_before_they_are_asked_for(tiny_dataset):
    reader, device = BatchReader(ShardReader(tiny_dataset, "train"), 0, 16), torch.device("cuda")
    prefetch = Prefetch(reader, 0, 1, 1000, 2, device)
    for step in range(20):
        batch, _ = prefetch.batch(step)
        assert batch.moments.is_cuda
        assert torch.equal((batch.moments * 1.0).cpu(), reader.batch(step, 0, 1).moments)
    prefetch.close()
