"""Samples by offset from memory-mapped shards; any step's batch is a pure function of (dataset, seed, step)."""

from __future__ import annotations

import io
import mmap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitdist.data.format import ShardEntry, file_sha256, load_index, load_manifest
from sitdist.errors import ConfigError, DataError
from sitdist.flow import draws

WINDOW = 8  # shards that are shuffled together


class ShardReader:
    """The samples of one split, by index. Every read checks the CRC of what it reads."""

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = load_manifest(folder)
        if split not in self.manifest.splits:
            raise ConfigError(f"{folder}: no split '{split}'; it has {', '.join(sorted(self.manifest.splits))}")
        entry = self.manifest.splits[split]
        self.shard_names = [shard.name for shard in entry.shards]
        self.shard_counts = [shard.count for shard in entry.shards]
        indices = [self._open_index(shard) for shard in entry.shards]
        self._index = {name: np.concatenate([index[name] for index in indices]) for name in indices[0]}
        self._shard_of = np.repeat(np.arange(len(indices)), self.shard_counts)
        if len(self._index["start"]) != entry.count:
            raise DataError(
                f"{folder}/{split}: shards of {len(self._index['start'])} samples but the manifest says {entry.count}; "
                "build the dataset again"
            )
        latent = self.manifest.latent
        self._moments_shape = (2 * latent.channels, latent.height, latent.width)
        self._maps: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._shard_of)

    def keys(self) -> list[str]:
        """The key of every sample, in order."""
        return [f"{index:09d}" for index in range(len(self))]

    def camera_to_world(self) -> Tensor:
        """Poses of all samples, [N, 4, 4] float64."""
        return torch.from_numpy(self._index["camera_to_world"])

    def labels(self) -> Tensor:
        """Labels of all samples, [N] int64."""
        return torch.from_numpy(self._index["label"])

    def codec_psnr(self) -> Tensor:
        """PSNR in dB of every sample's codec round trip, [N] float64; NaN in the training split."""
        return torch.from_numpy(self._index["codec_psnr"])

    def moments(self, indices: Sequence[int]) -> Tensor:
        """Moments [B, 2C, h, w] float16 of these samples."""
        return self.moments_and_poses(indices)[0]

    def moments_and_poses(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Moments [B, 2C, h, w] float16 and packed poses [B, 4, 4] float32 of these samples."""
        moments = np.empty((len(indices), *self._moments_shape), dtype=np.float16)
        poses = np.empty((len(indices), 4, 4), dtype=np.float32)
        for row, index in enumerate(indices):
            data, start = self._sample(index)
            offset = self._data_offset(data, "moments", index) - start
            moments[row] = np.frombuffer(data, np.float16, moments[row].size, offset).reshape(self._moments_shape)
            offset = self._data_offset(data, "packed_pose", index) - start
            poses[row] = np.frombuffer(data, np.float32, 16, offset).reshape(4, 4)
        return torch.from_numpy(moments), torch.from_numpy(poses)

    def images(self, indices: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of these samples; the training split keeps none."""
        pictures = []
        for index in indices:
            size = int(self._index["image_bytes"][index])
            if not size:
                raise DataError(f"{self._name(index)}: keeps no picture (the training split never does)")
            data, start = self._sample(index)
            offset = int(self._index["image"][index]) - start
            with Image.open(io.BytesIO(data[offset : offset + size]), formats=["PNG"]) as picture:
                pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255.0)
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return torch.stack(pictures)

    def _open_index(self, shard: ShardEntry) -> dict[str, np.ndarray]:
        path = (self.folder / self.split / shard.name).with_suffix(".index.npz")
        index = load_index(path)
        if file_sha256(path) != shard.index_sha256 or len(index["start"]) != shard.count:
            raise DataError(f"{path}: not the index that the manifest names; build the dataset again")
        return index

    def _path(self, shard: int) -> Path:
        return self.folder / self.split / self.shard_names[shard]

    def _name(self, index: int) -> str:
        return f"{self._path(int(self._shard_of[index]))}: sample {index:09d}"

    def _sample(self, index: int) -> tuple[bytes, int]:
        """The bytes of a sample, checked, and where in the tar they start."""
        start, stop = int(self._index["start"][index]), int(self._index["stop"][index])
        data = self._map(int(self._shard_of[index]))[start:stop]
        if len(data) != stop - start:
            raise DataError(f"{self._name(index)}: truncated tar; `sitdist shards verify {self.folder}` tells how much")
        if zlib.crc32(data) != self._index["crc32"][index]:
            raise DataError(
                f"{self._name(index)}: altered bytes (CRC differs); `sitdist shards verify {self.folder}` tells more"
            )
        return data, start

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            path = self._path(shard)
            try:
                with path.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read ({error}); build the dataset again") from None
        return self._maps[shard]

    def _data_offset(self, data: bytes, member: str, index: int) -> int:
        """Where the numbers of a .npy member begin in the tar: after a header of version 1 whose length it states."""
        offset, start = int(self._index[member][index]), int(self._index["start"][index])
        header = data[offset - start : offset - start + 10]
        return offset + 10 + int.from_bytes(header[8:10], "little")


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    moments [b, 2C, h, w] float32, packed_pose [b, 4, 4] float32, label [b], and the samples' global positions [b] in
    the endless sequence of epochs, by which all random numbers are drawn.
    """

    moments: Tensor
    packed_pose: Tensor
    label: Tensor
    positions: Tensor
    keys: list[str]

    def part(self, start: int, stop: int) -> Batch:
        """Samples start to stop of it."""
        rows = slice(start, stop)
        return Batch(
            self.moments[rows], self.packed_pose[rows], self.label[rows], self.positions[rows], self.keys[rows]
        )

    def to(self, device: torch.device) -> Batch:
        """All tensors on `device`."""
        moments, packed_pose, label, positions = (
            tensor.to(device, non_blocking=True)
            for tensor in (self.moments, self.packed_pose, self.label, self.positions)
        )
        return Batch(moments, packed_pose, label, positions, self.keys)


class BatchReader:
    """Global batch k is positions [k G, (k + 1) G) of the endless sequence of permutations; each rank takes its slice.

    An epoch's order shuffles the shards, then the samples inside windows of WINDOW shards, so that disks read in long
    runs. Nothing is remembered from step to step: any step's batch can be asked for at any time.
    """

    def __init__(self, reader: ShardReader, seed: int, global_batch: int) -> None:
        self.reader, self.seed, self.global_batch = reader, seed, global_batch
        self._starts = np.cumsum([0, *reader.shard_counts])
        self._labels = reader.labels()
        self._window_bounds = lru_cache(maxsize=2)(self._make_window_bounds)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def positions(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Global positions [G / world] int64 of a rank's slice."""
        assert self.global_batch % world == 0, (self.global_batch, world)
        share = self.global_batch // world
        first = step * self.global_batch + rank * share
        return torch.arange(first, first + share)

    def sample_indices(self, positions: Tensor) -> list[int]:
        """The samples at global positions."""
        return [self._sample_index(*divmod(position, len(self.reader))) for position in positions.tolist()]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """A rank's slice of the global batch of `step`."""
        positions = self.positions(step, rank, world)
        indices = self.sample_indices(positions)
        moments, poses = self.reader.moments_and_poses(indices)
        keys = [f"{index:09d}" for index in indices]
        return Batch(moments.float(), poses, self._labels[indices], positions, keys)

    def _sample_index(self, epoch: int, place: int) -> int:
        _, bounds = self._window_bounds(epoch)
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        return int(self._window(epoch, window)[place - int(bounds[window])])

    def _make_window_bounds(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the shards, and the place at which each window begins."""
        order = draws.permutation(self.seed, "shard order", len(self.reader.shard_counts), epoch).numpy()
        ends = np.cumsum(np.asarray(self.reader.shard_counts)[order])
        return order, np.concatenate([[0], ends[WINDOW - 1 :: WINDOW], ends[-1:]])

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window, in the epoch's order."""
        order, _ = self._window_bounds(epoch)
        shards = order[window * WINDOW : (window + 1) * WINDOW]
        samples = np.concatenate([np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards])
        return samples[draws.permutation(self.seed, f"window {window}", len(samples), epoch).numpy()]
