"""What was written is read, damage is named, and any step's batch is a pure function of (dataset, seed, step)."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from edited import Edited
from PIL import Image

from sitdist.dataset.batches import BatchReader
from sitdist.dataset.index import load_index
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.order import WINDOW
from sitdist.dataset.reader import Samples, ShardReader
from sitdist.dataset.verify import verify
from sitdist.errors import ConfigError, DataError

# ------------------------------------------------------------------------------------------------- samples by index


def stock_samples(folder, split):
    """The samples as a stock WebDataset gives them, decoded by explicit decoders, as shards/README.md shows it."""
    shards = load_manifest(folder).splits[split].shards
    tars = [str(folder / split / shard.name) for shard in shards]

    def npy(data):
        return np.load(io.BytesIO(data), allow_pickle=False)

    decoders = {"moments.npy": npy, "packed_pose.npy": npy, "camera_to_world.npy": npy, "meta.json": json.loads}
    return list(webdataset.WebDataset(tars, shardshuffle=False).map_dict(**decoders))


@pytest.mark.parametrize(("split", "count"), [("train", 48), ("test", 12), ("val", 8)])
def test_a_stock_webdataset_reads_the_same_samples(tiny_dataset, split, count):
    reader, samples = ShardReader(tiny_dataset, split), stock_samples(tiny_dataset, split)
    assert [sample["__key__"] for sample in samples] == reader.keys() == [f"{i:09d}" for i in range(count)]
    moments, packed_pose = reader.moments_and_poses(range(count))
    assert np.array_equal(np.stack([sample["moments.npy"] for sample in samples]), moments.numpy())
    assert np.array_equal(np.stack([sample["packed_pose.npy"] for sample in samples]), packed_pose.numpy())
    camera_to_world = np.stack([sample["camera_to_world.npy"] for sample in samples])
    assert np.array_equal(camera_to_world, reader.camera_to_world().numpy())
    assert [sample["meta.json"]["label"] for sample in samples] == reader.labels().tolist()
    radii = np.linalg.norm(camera_to_world[:, :3, 3], axis=1)
    assert np.allclose([sample["meta.json"]["radius"] for sample in samples], radii, atol=1e-12)
    assert samples[0]["meta.json"]["cx"] == samples[0]["meta.json"]["cy"] == 8.0
    assert samples[0]["meta.json"]["fx"] == pytest.approx(8.0 / np.tan(np.radians(20.0)))
    assert ("image.png" in samples[0]) == (split != "train")


def test_pictures_are_those_in_the_tar_and_the_training_split_keeps_none(tiny_dataset):
    samples = stock_samples(tiny_dataset, "test")
    images = ShardReader(tiny_dataset, "test").images([11, 3])
    for image, view in zip(images, (11, 3), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(samples[view]["image.png"])))
        assert np.array_equal((image * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy(), stored)
    with pytest.raises(DataError, match="sample 000000005: keeps no picture"):
        ShardReader(tiny_dataset, "train").images([5])


def test_intrinsics_come_from_the_index_without_opening_a_tar(tiny_dataset, monkeypatch):
    reader = ShardReader(tiny_dataset, "train")
    expected = [reader.meta(index).camera.normalized() for index in (40, 3, 17, 3)]
    monkeypatch.setattr(ShardReader, "open_tar", lambda self, number: pytest.fail(f"opens tar {number}"))
    assert ShardReader(tiny_dataset, "train").intrinsics([40, 3, 17, 3]).tolist() == expected


def test_a_shard_of_an_older_version_has_its_intrinsics_in_the_tar(tiny_dataset, tmp_path):
    older = Edited(tiny_dataset, tmp_path / "older")
    older.index("train", lambda index: index.pop("intrinsics"))  # of the first of three shards
    reader, newer = ShardReader(older.folder, "train"), ShardReader(tiny_dataset, "train")
    assert torch.equal(reader.intrinsics([40, 3, 17]), newer.intrinsics([40, 3, 17]))
    assert torch.equal(reader.camera_to_world(), newer.camera_to_world())
    assert BatchReader(reader, 0, 20).batch(3).keys == BatchReader(newer, 0, 20).batch(3).keys
    assert verify(older.folder) == []


def test_codec_psnr_is_known_for_views_that_keep_their_picture(tiny_dataset):
    assert ShardReader(tiny_dataset, "train").codec_psnr().isnan().all()
    val = ShardReader(tiny_dataset, "val").codec_psnr()
    assert val.mean().item() == pytest.approx(load_manifest(tiny_dataset).codec_psnr.mean)


def test_the_lines_of_the_format_spec_read_a_dataset(tiny_dataset, capsys):
    spec = (Path(__file__).parents[2] / "shards" / "README.md").read_text()
    lines = [line[4:] for line in spec.split("## Reading without sitdist")[1].splitlines() if line.startswith("    ")]
    assert len(lines) == 6
    exec("\n".join(lines).replace("DIR", str(tiny_dataset)), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 48
    assert printed[47].startswith("000000047 (8, 4, 4) ")


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.fixture
def damaged(tiny_dataset, tmp_path):
    """A copy of the dataset that a test may damage."""
    return shutil.copytree(tiny_dataset, tmp_path / "damaged")


@pytest.mark.parametrize("field", ["start", "moments", "packed_pose"])
def test_an_altered_byte_is_named_when_it_is_read(damaged, field):
    tar = damaged / "train" / "00001.tar"
    offset = int(load_index(tar.with_suffix(".index.npz"))[field][4]) + 90
    data = bytearray(tar.read_bytes())
    data[offset] ^= 1
    tar.write_bytes(data)
    reader = ShardReader(damaged, "train")
    with pytest.raises(
        DataError, match=r"00001\.tar: sample 000000020: altered bytes \(CRC differs\); `sitdist shards"
    ):
        reader.moments([19, 20])
    assert torch.isfinite(reader.moments([*range(20), *range(21, 48)])).all()  # all others can be read


def test_a_truncated_tar_is_named_when_what_it_lost_is_read(damaged):
    tar = damaged / "train" / "00002.tar"
    stop = int(load_index(tar.with_suffix(".index.npz"))["stop"][9])
    os.truncate(tar, stop)  # at a sample's boundary, where a stock reader only sees a shorter shard
    reader = ShardReader(damaged, "train")
    assert torch.isfinite(reader.moments(range(32 + 10))).all()
    with pytest.raises(DataError, match=r"00002\.tar: sample 000000042: truncated tar; `sitdist shards verify"):
        reader.moments([42])


def test_an_empty_or_missing_tar_is_named_when_it_is_read(damaged):
    os.truncate(damaged / "train" / "00000.tar", 0)
    (damaged / "train" / "00001.tar").unlink()
    reader = ShardReader(damaged, "train")
    for shard in (0, 1):
        with pytest.raises(DataError, match=rf"0000{shard}\.tar: cannot be read \(.*\); build the dataset again"):
            reader.moments([16 * shard])


def test_a_damaged_missing_or_exchanged_index_is_named_when_its_shard_is_first_read(damaged):
    first, second = (damaged / "train" / f"0000{shard}.index.npz" for shard in (0, 1))
    whole = first.read_bytes()
    cases = [
        (whole[:700], "damaged"),
        (whole[:900] + bytes([whole[900] ^ 1]) + whole[901:], "damaged|not the index"),
        (second.read_bytes(), r"00000\.index\.npz: not the index that the manifest names; build the dataset again"),
    ]
    for content, message in cases:
        first.write_bytes(content)
        with pytest.raises(DataError, match=message):
            ShardReader(damaged, "train").moments([3])
        with pytest.raises(DataError, match=message):
            ShardReader(damaged, "train").labels()
    first.unlink()
    reader = ShardReader(damaged, "train")
    assert torch.isfinite(reader.moments(range(16, 48))).all()  # of the other shards
    with pytest.raises(DataError, match=r"00000\.index\.npz: cannot be read"):
        reader.moments([15])


# ---------------------------------------------------------------------------------------------------- global batches


class Counts:
    """Of a split, only how many samples every shard holds: enough for the order in which they are read."""

    def __init__(self, *shard_counts):
        self.shard_counts = list(shard_counts)


def order(counts, epoch, seed=0):
    reader = BatchReader(Counts(*counts), seed, 1)
    count = sum(counts)
    return reader.sample_indices(torch.arange(epoch * count, (epoch + 1) * count)).tolist()


@pytest.mark.parametrize("counts", [[5], [1] * WINDOW, [3] * WINDOW * 2, [4] * 19 + [1], [7, 1, 9, 2] * 6])
def test_every_epoch_holds_every_sample_exactly_once_in_an_order_of_its_own(counts):
    epochs = [order(counts, epoch) for epoch in (0, 1, 7)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(sum(counts)))
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(counts, 0) == epochs[0]
    assert order(counts, 0, seed=1) != epochs[0]


def test_samples_are_shuffled_inside_windows_of_whole_shards():
    counts = [4] * 19 + [1]  # windows of 8, 8 and 4 shards
    shard_of = np.repeat(np.arange(20), counts)
    windows = []
    for epoch in range(3):
        places, start = order(counts, epoch), 0
        seen = []
        while start < len(places):
            shards, stop = set(), start
            while stop < len(places) and (shard_of[places[stop]] in shards or len(shards) < WINDOW):
                shards.add(shard_of[places[stop]])
                stop += 1
            window = places[start:stop]
            assert sorted(window) == [i for i in range(77) if shard_of[i] in shards]  # whole shards, all of them
            jumps = np.diff(shard_of[window]) != 0
            assert jumps.sum() > len(shards)  # and not shard after shard
            seen.append(shards)
            start = stop
        assert [len(shards) for shards in seen] == [8, 8, 4]
        windows.append(seen)
    assert windows[0] != windows[1] != windows[2]  # other shards together in another epoch


def test_a_batch_is_a_pure_function_of_the_step_and_needs_no_steps_before_it(tiny_dataset):
    one_by_one = BatchReader(ShardReader(tiny_dataset, "train"), 3, 20)
    batches = [one_by_one.batch(step) for step in range(6)]
    for step in (5, 0, 3, 4):
        alone = BatchReader(ShardReader(tiny_dataset, "train"), 3, 20).batch(step)
        assert alone.keys == batches[step].keys
        assert torch.equal(alone.moments, batches[step].moments)
        assert torch.equal(alone.packed_pose, batches[step].packed_pose)
    assert batches[0].keys != BatchReader(ShardReader(tiny_dataset, "train"), 4, 20).batch(0).keys


def test_batches_run_through_the_epochs_without_a_seam(tiny_dataset):
    reader = BatchReader(ShardReader(tiny_dataset, "train"), 0, 20)
    keys = [key for step in range(12) for key in reader.batch(step).keys]  # 240 samples: five epochs of 48
    for epoch in range(5):
        assert sorted(keys[48 * epoch : 48 * (epoch + 1)]) == reader.reader.keys()
    assert torch.cat([reader.positions(step) for step in range(12)]).tolist() == list(range(240))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_slices_of_all_ranks_are_the_global_batch(tiny_dataset, world):
    whole = BatchReader(ShardReader(tiny_dataset, "train"), 5, 16)
    for step in (0, 2, 1_000_003):
        batch = whole.batch(step)
        parts = [
            BatchReader(ShardReader(tiny_dataset, "train"), 5, 16).batch(step, rank, world) for rank in range(world)
        ]
        assert [len(part.keys) for part in parts] == [16 // world] * world
        assert [key for part in parts for key in part.keys] == batch.keys
        for name in ("moments", "packed_pose", "label", "positions"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert batch.positions.tolist() == list(range(16 * step, 16 * step + 16))


def test_a_batch_holds_the_samples_that_its_keys_name(tiny_dataset):
    reader = ShardReader(tiny_dataset, "train")
    batch = BatchReader(reader, 0, 12).batch(7)
    indices = [int(key) for key in batch.keys]
    moments, poses = reader.moments_and_poses(indices)
    assert torch.equal(batch.moments, moments.float())
    assert torch.equal(batch.packed_pose, poses)


def test_labels_follow_the_samples():
    class Split(Counts):
        def samples(self, indices):
            labels = torch.from_numpy(10 * indices)
            return Samples(torch.zeros(len(indices), 2, 1, 1), torch.zeros(len(indices), 4, 4), labels, {})

        def expect(self, shards):
            pass

    batch = BatchReader(Split(3, 4), 0, 7).batch(2)
    assert batch.label.tolist() == [10 * int(key) for key in batch.keys]


@pytest.mark.parametrize("world", [2, 4])
def test_a_node_reads_its_own_share_of_the_shards_and_all_of_it_every_epoch(world):
    counts, nodes = [4] * 19 + [1], 2
    reader = BatchReader(Counts(*counts), 0, 8, nodes=nodes)
    shard_of = np.repeat(np.arange(20), counts)
    read = {node: [] for node in range(nodes)}
    for step in range(40):
        slices = [reader.sample_indices(reader.positions(step, rank, world)).tolist() for rank in range(world)]
        assert [index for part in slices for index in part] == reader.sample_indices(reader.positions(step)).tolist()
        for rank, samples in enumerate(slices):
            read[rank * nodes // world] += samples
    for node, samples in read.items():
        mine = [index for index in range(77) if shard_of[index] % nodes == node]
        assert sorted(samples[: len(mine)]) == mine  # the first epoch of the node
        assert set(samples) == set(mine)
        assert samples[: len(mine)] != samples[len(mine) : 2 * len(mine)]


def test_more_nodes_than_shards_are_refused(tiny_dataset):
    with pytest.raises(ConfigError, match=r"reader\.split_by_node: 3 shards cannot be split over 4 nodes"):
        BatchReader(ShardReader(tiny_dataset, "train"), 0, 8, nodes=4)
