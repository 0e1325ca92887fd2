"""A split held in memory gives the batches that reading it gives, and leaves its files alone."""

import shutil

import torch

from sitdist.dataset.batches import BatchReader
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.resident import ResidentSamples


def same(a, b):
    tensors = ("moments", "packed_pose", "label", "positions")
    return a.keys == b.keys and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_batches_are_bit_equal_and_the_tars_are_no_longer_needed(tiny_dataset, tmp_path):
    folder = shutil.copytree(tiny_dataset, tmp_path / "data")
    resident = BatchReader(ResidentSamples(ShardReader(folder, "train")), 3, 20)
    shutil.rmtree(folder)
    read = BatchReader(ShardReader(tiny_dataset, "train"), 3, 20)
    for step in (0, 2, 1000):
        assert same(resident.batch(step), read.batch(step))
    assert same(resident.batch(4, 1, 2), read.batch(4, 1, 2))


def test_a_sample_that_was_damaged_when_it_was_loaded_is_told_whenever_it_is_asked_for(tiny_dataset, tmp_path):
    folder = shutil.copytree(tiny_dataset, tmp_path / "data")
    tar = folder / "train" / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[1000] ^= 1  # of sample 16
    tar.write_bytes(data)
    reader = ShardReader(folder, "train")
    resident = BatchReader(ResidentSamples(reader), 0, 48, "replace", 1)
    read = BatchReader(reader, 0, 48, "replace", 1)
    for step in range(2):
        assert same(resident.batch(step), read.batch(step))
    assert resident.bad_samples == read.bad_samples == {"000000016": 2}
