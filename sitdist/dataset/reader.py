"""The samples of a split, read by offset from memory-mapped shards."""

from __future__ import annotations

import math
import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import get_ident
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from sitdist.dataset.format import (
    BUILD_AGAIN,
    IMAGE_MEMBER,
    MEMBERS,
    VIEW_MEMBER,
    SampleMeta,
    index_name,
    npy_header,
    parse_meta,
    sample_key,
    sample_members,
)
from sitdist.dataset.index import check_index, check_split, load_index
from sitdist.dataset.lru_cache import LruCache
from sitdist.dataset.manifest import MANIFEST, load_manifest
from sitdist.dataset.order import WINDOW
from sitdist.dataset.store import Store, open_store
from sitdist.errors import ConfigError, DataError
from sitdist.io.atomic import file_sha256
from sitdist.io.files import open_file
from sitdist.io.images import open_picture

OPEN_SHARDS = 8 * WINDOW  # shards whose index and memory map are kept
READ_FIELDS = ("start", "stop", "crc32", "moments", "packed_pose", "view", "image", "image_bytes", "label")
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # before width, height, bit depth and colour type
COLUMNS = ("camera_to_world", "label", "codec_psnr")


@dataclass(frozen=True)
class Samples:
    """Moments [B, 2C, h, w] float16, packed poses [B, 4, 4] float32 and labels [B] of some samples.

    `view` [B, 4, H, W] uint8: light and transmittance of each, where they are read.
    `faults` says what is wrong with each row that cannot be used; the contents of such a row are undefined.
    """

    moments: Tensor
    packed_pose: Tensor
    label: Tensor
    faults: dict[int, str]
    view: Tensor | None = None


class SampleSource(Protocol):
    """Samples by number, in shards on disk or in memory."""

    shard_counts: list[int]

    def samples(self, indices: np.ndarray) -> Samples: ...

    def expect(self, shards: list[int]) -> None: ...

    def reading(self) -> list[str]: ...


class ShardReader:
    """The samples of one split, by number. Every read checks the CRC of the samples and that their numbers are finite.

    The index of a shard is loaded, and checked against the manifest, when its first sample is read. The OPEN_SHARDS
    most recent ones are kept, so memory does not grow with the dataset. `views`: read the views without background, too
    (ConfigError if the dataset keeps none).
    """

    def __init__(self, dataset: str | Path | Store, split: str, views: bool = False) -> None:
        self.store = open_store(dataset) if isinstance(dataset, str | Path) else dataset
        self.folder, self.split = self.store.folder, split
        self.manifest = load_manifest(self.folder)
        if split not in self.manifest.splits:
            raise ConfigError(f"{self.folder}: no split '{split}'; it has {', '.join(sorted(self.manifest.splits))}")
        entry = self.manifest.splits[split]
        self.shards = entry.shards
        self.shard_names = [shard.name for shard in entry.shards]
        self.shard_counts = [shard.count for shard in entry.shards]
        self._starts = np.concatenate([[0], np.cumsum(self.shard_counts, dtype=np.int64)])
        arrays = self.manifest.arrays()
        self._moments, self._packed_pose = (_Member(name, *arrays[name]) for name in ("moments", "packed_pose"))
        if views and not self.manifest.keeps_views:
            raise ConfigError(
                f"{self.folder}: keeps no views, which appearance needs; set keep_views: true in the recipe and build "
                "the dataset again, or leave appearance out"
            )
        self.views = views
        self._view = _Member("view", *arrays["view"]) if views else None
        self._open = LruCache(self._open_shard, OPEN_SHARDS)
        self._intrinsics: LruCache[int, np.ndarray | None] = LruCache(
            lambda number: self.index(number).get("intrinsics"), len(self.shards)
        )
        self._reading: dict[int, int] = {}  # thread: the shard that it reads

    def __len__(self) -> int:
        return int(self._starts[-1])

    def keys(self) -> list[str]:
        """The key of every sample, in order."""
        return [sample_key(index) for index in range(len(self))]

    def camera_to_world(self) -> Tensor:
        """Poses of all samples, [N, 4, 4] float64. Like the next two, the first call reads every index."""
        return torch.from_numpy(self._columns["camera_to_world"])

    def labels(self) -> Tensor:
        """Labels of all samples, [N] int64."""
        return torch.from_numpy(self._columns["label"])

    def codec_psnr(self) -> Tensor:
        """PSNR in dB of every sample's codec round trip, [N] float64; NaN in the training split."""
        return torch.from_numpy(self._columns["codec_psnr"])

    def samples(self, indices: np.ndarray) -> Samples:
        """The samples `indices` [B] int64; `faults` names those that are damaged."""
        moments, poses = self._moments.buffer(len(indices)), self._packed_pose.buffer(len(indices))
        views = None if self._view is None else self._view.buffer(len(indices))
        labels = np.empty(len(indices), dtype=np.int64)
        faults: dict[int, str] = {}
        for number, rows in self._by_shard(indices):
            self._reading[get_ident()] = number
            shard, places = self._open(number), indices[rows] - self._starts[number]
            whole = shard.are_whole(places)
            for row in rows[~whole].tolist():
                faults[row] = self._fault(int(indices[row]))
            rows, places = rows[whole], places[whole]
            moments[rows] = self._moments.read(shard, places)
            poses[rows] = self._packed_pose.read(shard, places)
            if views is not None and self._view is not None:
                views[rows] = self._view.read(shard, places)
            labels[rows] = shard.index["label"][places]
        self._reading.pop(get_ident(), None)
        if not (self._moments.are_finite(moments) and self._packed_pose.are_finite(poses)):
            for row in set(range(len(indices))) - faults.keys():
                one = slice(row, row + 1)
                if not (self._moments.are_finite(moments[one]) and self._packed_pose.are_finite(poses[one])):
                    faults[row] = f"{self._name(int(indices[row]))}: NaN or infinity in its arrays; {BUILD_AGAIN}"
        view = None if views is None or self._view is None else self._view.tensor(views)
        latents, packed_poses = self._moments.tensor(moments), self._packed_pose.tensor(poses)
        return Samples(latents, packed_poses, torch.from_numpy(labels), faults, view)

    def reading(self) -> list[str]:
        """The shards that threads are reading in `samples` now."""
        numbers = sorted(set(self._reading.copy().values()))
        return [str(self.folder / self._files(number)[1][0]) for number in numbers]

    def moments(self, indices: Sequence[int]) -> Tensor:
        """Moments [B, 2C, h, w] float16 of these samples; DataError for the first that is damaged."""
        return self.moments_and_poses(indices)[0]

    def moments_and_poses(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Moments and packed poses [B, 4, 4] float32 of these samples; DataError for the first that is damaged."""
        samples = self.samples(np.asarray(indices, dtype=np.int64))
        if samples.faults:
            raise DataError(samples.faults[min(samples.faults)])
        return samples.moments, samples.packed_pose

    def images(self, indices: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of these samples; DataError for `train`, which keeps none."""
        pictures = []
        for index in indices:
            picture = open_picture(self._png(index), self._name(index))
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255.0)
            pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return torch.stack(pictures)

    def intrinsics(self, indices: Sequence[int]) -> Tensor:
        """fx / width, fy / height, cx / width, cy / height of these samples' cameras, [B, 4] float64.

        They come from the indexes; where an older version built a shard without them, from meta.json of each sample.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        found = np.empty((len(numbers), 4))
        for shard, rows in self._by_shard(numbers):
            known = self._intrinsics(shard)
            if known is not None:
                found[rows] = known[numbers[rows] - self._starts[shard]]
            else:
                found[rows] = [self.meta(index).camera.normalized() for index in numbers[rows].tolist()]
        return torch.from_numpy(found)

    def meta(self, index: int) -> SampleMeta:
        """The contents of meta.json of a sample; DataError if the sample is damaged."""
        shard, place = self._open_whole(index)
        data = shard.tar[int(shard.index["start"][place]) : int(shard.index["stop"][place])]
        try:
            members = sample_members(data, sample_key(index), self.members)
        except ValueError as error:
            raise DataError(f"{self._name(index)}: {error}; {BUILD_AGAIN}") from None
        return parse_meta(members["meta.json"][1], self.manifest.image_size, f"{self._name(index)}: meta.json")

    @property
    def members(self) -> tuple[str, ...]:
        """The names of every sample's members."""
        views = (VIEW_MEMBER,) if self.manifest.keeps_views else ()
        return (*MEMBERS, *views) if self.split == "train" else (*MEMBERS, IMAGE_MEMBER, *views)

    def expect(self, shards: list[int]) -> None:
        """Read or fetch these shards in the background, because their samples will be asked for soon."""
        self.store.expect([file for number in shards for file in self._files(number)])

    def _png(self, index: int) -> bytes:
        if self.split == "train":
            raise DataError(f"{self._name(index)}: keeps no picture (the training split never does)")
        shard, place = self._open_whole(index)
        offset, size = int(shard.index["image"][place]), int(shard.index["image_bytes"][place])
        data, pixels = shard.tar[offset : offset + size], self.manifest.image_size
        if not data.startswith(PNG + struct.pack(">IIBB", pixels, pixels, 8, 2)):
            raise DataError(f"{self._name(index)}: its picture is no 8-bit RGB PNG of {pixels}x{pixels}; {BUILD_AGAIN}")
        return data

    def _open_whole(self, index: int) -> tuple[_Shard, int]:
        """The shard of a sample, and its place there; DataError if the sample is damaged."""
        number, place = self._place(index)
        shard = self._open(number)
        if not shard.are_whole(np.asarray([place])).all():
            raise DataError(self._fault(index))
        return shard, place

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        indexes = []
        for number in range(len(self.shards)):
            index = self.index(number)
            indexes.append({name: index[name] for name in COLUMNS})
        columns = {name: np.concatenate([index[name] for index in indexes]) for name in COLUMNS}
        try:
            check_split(columns, self.manifest, self.split)
        except DataError as error:
            raise DataError(f"{self.folder / MANIFEST}: splits.{self.split}: {error}; {BUILD_AGAIN}") from None
        return columns

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each shard that holds some of these samples, and their rows in `indices`, in the order of the shard."""
        rows = np.argsort(indices, kind="stable")
        numbers = np.searchsorted(self._starts, indices[rows], side="right") - 1
        firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
        yield from zip(numbers[firsts].tolist(), np.split(rows, firsts[1:]), strict=False)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, int(index - self._starts[number])

    def _files(self, number: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """The index and the tar of a shard: name in the dataset, and SHA-256."""
        shard = self.shards[number]
        tar = f"{self.split}/{shard.name}"
        return (index_name(tar), shard.index_sha256), (tar, shard.sha256)

    def index(self, number: int) -> dict[str, np.ndarray]:
        """The index of a shard; DataError if it is damaged, or contradicts the manifest."""
        shard = self.shards[number]
        file, sha256 = self._files(number)[0]
        path = self.store.path(file, sha256)
        index = load_index(path, shard.count)
        if file_sha256(path) != sha256:
            raise DataError(f"{path}: not the index that the manifest names; {BUILD_AGAIN}")
        try:
            check_index(index, self.manifest, self.split, shard, int(self._starts[number]))
        except DataError as error:
            raise DataError(f"{path}: {error}; {BUILD_AGAIN}") from None
        return index

    def open_tar(self, number: int) -> AbstractContextManager[BinaryIO]:
        """The tar of a shard, open for reading; DataError if it cannot be."""
        return open_file(self.store.path(*self._files(number)[1]), BUILD_AGAIN)

    def _open_shard(self, number: int) -> _Shard:
        index = self.index(number)
        with self.open_tar(number) as file:
            path = Path(file.name)
            try:
                tar = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:  # empty
                raise DataError(f"{path}: cannot be read ({error}); {BUILD_AGAIN}") from None
        return _Shard(path, {name: index[name] for name in READ_FIELDS if name in index}, tar)

    def _name(self, index: int) -> str:
        file, _ = self._files(self._place(index)[0])[1]
        return f"{self.folder / file}: sample {sample_key(index)}"

    def _fault(self, index: int) -> str:
        """The message for a sample that is not whole."""
        number, place = self._place(index)
        shard = self._open(number)
        if shard.index["stop"][place] > len(shard.tar):
            return f"{self._name(index)}: truncated tar; `sitdist shards verify {self.folder}` tells how much"
        return f"{self._name(index)}: altered bytes (CRC differs); `sitdist shards verify {self.folder}` tells more"


@dataclass(frozen=True)
class _Shard:
    """A memory-mapped tar and the columns of its index that training reads."""

    path: Path
    index: dict[str, np.ndarray]
    tar: mmap.mmap

    def are_whole(self, places: np.ndarray) -> np.ndarray:
        """Whether each of the samples at rows `places` [n] is complete and has its CRC, [n] bool."""
        starts, stops, wanted = (self.index[name][places] for name in ("start", "stop", "crc32"))
        crc32, data = zlib.crc32, memoryview(self.tar)
        crcs = [crc32(data[start:stop]) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        return (np.asarray(crcs, dtype=np.uint32) == wanted) & (stops <= len(self.tar))

    def windows(self, size: int) -> np.ndarray:
        """The `size` bytes that begin at every byte of the tar, [tar - size + 1]; a view, without a copy."""
        return np.ndarray(len(self.tar) - size + 1, f"V{size}", self.tar, strides=(1,))


class _Member:
    """Reads one .npy member of many samples at once; they all have the same header and so the same size."""

    def __init__(self, field: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.field, self.dtype, self.shape = field, np.dtype(dtype), shape
        self._header, self._size = npy_header(dtype, shape), math.prod(shape) * self.dtype.itemsize
        if self.dtype.kind == "f":
            bits = np.array([np.inf, -np.inf], dtype).view(
                f"<i{self.dtype.itemsize}"
            )  # NaN lies above either, in its sign
            self._infinity, self._minus_infinity = bits[0], bits[1:].view(f"<u{self.dtype.itemsize}")[0]

    def buffer(self, count: int) -> np.ndarray:
        """An empty buffer for the bytes of `count` arrays, [count]."""
        return np.empty(count, f"V{self._size}")

    def read(self, shard: _Shard, places: np.ndarray) -> np.ndarray:
        """The bytes of the arrays of whole samples, [n]; DataError if one is of another type or shape."""
        if not len(places):
            return self.buffer(0)
        at = shard.index[self.field][places]
        if shard.windows(len(self._header))[at].tobytes() != len(at) * self._header:
            raise DataError(
                f"{shard.path}: holds a {self.field}.npy that is no {self.dtype} array of {list(self.shape)} in .npy "
                f"version 1.0; {BUILD_AGAIN}"
            )
        return shard.windows(self._size)[at + len(self._header)]

    def are_finite(self, data: np.ndarray) -> bool:
        """Whether all numbers in these bytes are finite. Comparing the largest bit patterns is faster than isfinite."""
        signed, unsigned = (data.view(f"<{kind}{self.dtype.itemsize}") for kind in "iu")
        return bool(signed.max(initial=0) < self._infinity and unsigned.max(initial=0) < self._minus_infinity)

    def tensor(self, data: np.ndarray) -> Tensor:
        """Bytes as arrays, [n, *shape]."""
        return torch.from_numpy(data.view(self.dtype).reshape(-1, *self.shape))
