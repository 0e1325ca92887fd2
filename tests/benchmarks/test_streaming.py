"""Shards without an index as a stream: everything once, in an order by seed and epoch, and nothing unpickled."""

import io
import itertools
import os
import pickle
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from benchmarks.streaming import ShardUrls, stream_batches
from sitdist.dataset.reader import ShardReader
from sitdist.errors import DataError


@pytest.fixture
def tars(tiny_dataset):
    return [str(path) for path in sorted((tiny_dataset / "train").glob("*.tar"))]


def on_rank(monkeypatch, rank, world, worker=0, workers=1):
    """What the launcher and the DataLoader tell webdataset."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("WORKER", worker), ("NUM_WORKERS", workers)):
        monkeypatch.setenv(name, str(value))


def poses(stream, batches=None):
    """The packed poses of a stream, as bytes by which samples can be told apart."""
    return [pose.numpy().tobytes() for _, batch, _ in itertools.islice(stream, batches) for pose in batch]


def test_a_stream_gives_what_the_reader_gives(tiny_dataset, tars):
    moments, packed_pose = ShardReader(tiny_dataset, "train").moments_and_poses(range(48))
    numbers = {pose.numpy().tobytes(): number for number, pose in enumerate(packed_pose)}
    batches = list(stream_batches(tars, 20, seed=0))
    assert [len(batch) for batch, _, _ in batches] == [20, 20, 8]
    for streamed, batch_poses, labels in batches:
        rows = [numbers[pose.numpy().tobytes()] for pose in batch_poses]
        assert torch.equal(streamed, moments[rows].float())
        assert labels.tolist() == [0] * len(rows)
    assert sorted(poses(batches)) == sorted(numbers)


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 1), (1, 3), (3, 1), (2, 2)])
def test_all_ranks_and_workers_together_see_every_sample_once(monkeypatch, tars, world, workers):
    seen = []
    for rank, worker in itertools.product(range(world), range(workers)):
        on_rank(monkeypatch, rank, world, worker, workers)
        seen += poses(stream_batches(tars, 7, seed=1, epoch=4))
    assert len(seen) == len(set(seen)) == 48


def test_the_order_is_one_of_seed_and_epoch(tars):
    def order(seed, epoch):
        return poses(stream_batches(tars, 16, seed, epoch))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))}) == 3


def test_resampling_is_by_seed_epoch_rank_and_worker_and_ends_never(monkeypatch, tars):
    def drawn(rank=0, worker=0, seed=0, epoch=0):
        on_rank(monkeypatch, rank, 2, worker, 2)
        urls = ShardUrls(tars, seed, epoch, resample=True)
        return tuple(shard["url"] for shard in itertools.islice(urls, 40))

    assert drawn() == drawn()
    assert set(drawn()) == set(tars)
    assert len({drawn(), drawn(rank=1), drawn(worker=1), drawn(seed=1), drawn(epoch=1)}) == 5
    batches = stream_batches(tars, 16, seed=0, resample=True, shuffle_buffer=50)
    assert len(poses(batches, 30)) == 30 * 16


def test_a_resampled_stream_can_be_repeated(tars):
    first, second = (poses(stream_batches(tars, 16, 5, resample=True, shuffle_buffer=50), 5) for _ in range(2))
    assert first == second


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_members(tar, out, changed):
    """A copy of a tar with members of its first sample added or exchanged."""
    with tarfile.open(tar) as source, tarfile.open(out, "w") as target:
        members = [(member, source.extractfile(member).read()) for member in source]
        key = members[0][0].name.partition(".")[0]
        names = {f"{key}.{name}": data for name, data in changed.items()}
        mine = [(m.name, data) for m, data in members if m.name not in names]
        first = [(name, data) for name, data in mine if name.startswith(key)]
        for name, data in [*first, *names.items(), *mine[len(first) :]]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return str(out)


def test_a_pickle_in_a_tar_is_never_unpickled(tars, tmp_path):
    planted = pickle.dumps(Touch(tmp_path / "hit"))
    extra = with_members(
        tars[0], tmp_path / "extra.tar", dict.fromkeys(("a.pyd", "b.pkl", "c.pickle", "d.pth"), planted)
    )
    assert len(poses(stream_batches([extra], 16, seed=0))) == 16
    array = io.BytesIO()
    np.save(array, np.asarray([Touch(tmp_path / "hit")], dtype=object), allow_pickle=True)
    for name in ("moments.npy", "packed_pose.npy"):
        inside = with_members(tars[0], tmp_path / "inside.tar", {name: array.getvalue()})
        with pytest.raises(DataError, match=r"inside\.tar: sample 000000000: not of the format"):
            poses(stream_batches([inside], 16, seed=0))
    assert not (tmp_path / "hit").exists()
    with suppress(webdataset.autodecode.DecodingError):
        next(iter(webdataset.WebDataset([extra], shardshuffle=False).decode()), None)
    assert (tmp_path / "hit").exists()  # what the stock decoders do with it


def test_no_url_runs_a_command(tmp_path):
    for url in (f"pipe:touch {tmp_path / 'hit'}", f"pipe://touch {tmp_path / 'hit'}"):
        with pytest.raises(DataError, match=r"pipe:.*: cannot be read"):
            next(iter(stream_batches([url], 4, seed=0)))
    assert not (tmp_path / "hit").exists()


def test_missing_shards_and_missing_members_are_named(tars, tmp_path):
    with pytest.raises(DataError, match=r"none\.tar: cannot be read"):
        next(iter(stream_batches([str(tmp_path / "none.tar")], 4, seed=0)))
    with pytest.raises(DataError, match="no shards to stream"):
        stream_batches([], 4, seed=0)
    empty = with_members(tars[0], tmp_path / "empty.tar", {"meta.json": b"{}"})
    with pytest.raises(DataError, match=r"empty\.tar: sample 000000000: not of the format \(KeyError\('label'\)\)"):
        next(iter(stream_batches([empty], 16, seed=0)))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "changed",
    [
        {"moments.npy": npy(np.full((8, 4, 4), np.nan, np.float16))},
        {"moments.npy": npy(np.zeros((8, 4, 4), np.float32))},
        {"moments.npy": npy(np.zeros((8, 4), np.float16))},
        {"moments.npy": npy(np.zeros((8, 8, 4), np.float16))},
        {"packed_pose.npy": npy(np.full((4, 4), np.inf, np.float32))},
        {"packed_pose.npy": npy(np.zeros((3, 4), np.float32))},
        {"meta.json": b'{"label": -1}'},
        {"meta.json": b'{"label": "0"}'},
        {"meta.json": b'{"label": NaN}'},
        {"meta.json": b"[]"},
    ],
)
def test_samples_that_no_model_can_use_are_refused(tars, tmp_path, changed):
    with pytest.raises(DataError) as raised:
        poses(stream_batches([with_members(tars[0], tmp_path / "bad.tar", changed)], 16, seed=0))
    assert "\n" not in str(raised.value)


def test_what_is_no_tar_is_named(tars, tmp_path):
    for name, data in (("cut", Path(tars[0]).read_bytes()[:3000]), ("noise", bytes(range(1, 251)) * 40)):
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.tar: no readable tar \("):
            poses(stream_batches([str(tmp_path / f"{name}.tar")], 16, seed=0))


def test_shards_are_streamed_from_fsspec_urls(tiny_dataset, tars, tmp_path):
    urls = [f"file://{shutil.copy(tar, tmp_path)}" for tar in tars]
    assert sorted(poses(stream_batches(urls, 48, seed=0))) == sorted(poses(stream_batches(tars, 48, seed=0)))
