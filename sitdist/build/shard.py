"""Build shards: encode views into samples, batch by batch and ahead of the writer, then write the tar and its index."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from sitdist.build.sources import ViewSource, cut_out
from sitdist.dataset.format import IMAGE_MEMBER, INDEX_FIELDS, VIEW_MEMBER, index_name, padded_size, sample_key
from sitdist.dataset.index import load_index
from sitdist.dataset.manifest import ShardEntry
from sitdist.errors import DataError
from sitdist.geometry.camera import camera_radius
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.arrays import save_arrays
from sitdist.io.atomic import file_sha256, write_atomically
from sitdist.model.codec import Codec, latent_mean, psnr

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Split:
    """Views of a source that form a split: `indices` [n] int64 into the source, in order."""

    name: str
    source: ViewSource
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def camera_to_world(self) -> Tensor:
        """Poses [n, 4, 4] float64."""
        return self.source.camera_to_world[self.indices]

    @property
    def is_zoomed(self) -> Tensor:
        """Whether each view [n] is a zoomed copy of another, made by radius augmentation."""
        return self.source.original[self.indices] != self.indices

    @property
    def intrinsics(self) -> Tensor:
        """fx / width, fy / height, cx / width, cy / height of every view, [n, 4] float64."""
        cameras = [self.source.intrinsics(view).normalized() for view in self.indices.tolist()]
        return torch.tensor(cameras, dtype=torch.float64)

    @property
    def keeps_images(self) -> bool:
        """Whether the pictures themselves are stored too."""
        return self.name != "train"


@dataclass(frozen=True)
class Shard:
    """The `number`th shard of a split: samples `first` and on, of the source's views `indices` [n]."""

    split: Split
    number: int
    first: int
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def name(self) -> str:
        """Its name among all shards of the dataset."""
        return f"{self.split.name}/{self.number:05d}"

    def tar(self, out: Path) -> Path:
        """The path of its tar."""
        return out / f"{self.name}.tar"

    def index(self, out: Path) -> Path:
        """The path of its index, which is written after the tar: a shard that has it is complete."""
        return out / index_name(f"{self.name}.tar")


def shards_of(split: Split, size: int) -> list[Shard]:
    """Divide the split into shards of `size` samples; the last one may be smaller."""
    return [Shard(split, number, number * size, chunk) for number, chunk in enumerate(split.indices.split(size))]


@dataclass(frozen=True)
class BuiltShard:
    """A shard on disk: its manifest entry, and the PSNR in dB of the codec's round trip of every kept picture."""

    entry: ShardEntry
    codec_psnr: list[float]


# --------------------------------------------------------------------------------------------------- views to samples


@dataclass(frozen=True)
class ViewBatch:
    """Views that are encoded together: samples `first` and on of a split, views `indices` of its source."""

    split: Split
    first: int
    indices: list[int]


@dataclass(frozen=True)
class Sample:
    """One sample: "__key__" and its members as bytes, and the columns of the index that do not come from the tar."""

    members: dict[str, Any]
    columns: dict[str, Any]


@dataclass(frozen=True)
class SampleMaker:
    """Renders or loads views, encodes them in batches of `batch` (the last one padded), and makes samples."""

    codec: Codec
    statistics: PoseStatistics
    batch: int
    keep_views: bool = False

    def batches(self, shard: Shard) -> list[ViewBatch]:
        """The batches of one shard, in order; no batch spans two shards."""
        chunks = shard.indices.split(self.batch)
        return [ViewBatch(shard.split, shard.first + n * self.batch, chunk.tolist()) for n, chunk in enumerate(chunks)]

    def __call__(self, batch: ViewBatch) -> list[Sample]:
        """The samples of one batch; DataError where a picture cannot be read or a latent is not finite."""
        source = batch.split.source
        views = source.views(batch.indices)
        images = source.pictures(batch.indices, views)
        moments = self._encode(batch, images)
        keep = batch.split.keeps_images
        codec_psnr = _codec_psnr(self.codec, moments, images, self.batch) if keep else [float("nan")] * len(images)
        samples = []
        for row, index in enumerate(batch.indices):
            kept = _without_background(source, index, views[row], images[row]) if self.keep_views else None
            image = images[row] if keep else None
            samples.append(self._sample(batch, row, moments[row], image, kept, codec_psnr[row]))
        return samples

    @torch.no_grad()
    def _encode(self, batch: ViewBatch, images: Tensor) -> Tensor:
        """Moments of the images, float16; DataError that names the views where they are not finite."""
        moments = self.codec.encode_moments(_padded(images, self.batch))[: len(images)]
        stored = moments.to(torch.float16)
        bad = (~stored.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()
        if bad:
            views = ", ".join(str(batch.indices[row]) for row in bad[:8]) + (" ..." if len(bad) > 8 else "")
            raise DataError(f"{batch.split.name} view {views}: {_why_not_finite(self.codec, moments)}")
        return stored

    def _sample(
        self,
        batch: ViewBatch,
        row: int,
        moments: Tensor,
        image: Tensor | None,
        kept_view: Tensor | None,
        codec_psnr: float,
    ) -> Sample:
        source, view = batch.split.source, batch.indices[row]
        camera_to_world = source.camera_to_world[view]
        intrinsics = torch.tensor(source.intrinsics(view).normalized(), dtype=torch.float64)
        members = {
            "__key__": sample_key(batch.first + row),
            "camera_to_world.npy": _npy(camera_to_world),
            "meta.json": json.dumps(_meta(source, view), allow_nan=False).encode(),
            "moments.npy": _npy(moments),
            "packed_pose.npy": _npy(standardize(camera_to_world, self.statistics, intrinsics).float()),
        }
        if image is not None:
            members[IMAGE_MEMBER] = _png(image)
        if kept_view is not None:
            members[VIEW_MEMBER] = _npy((kept_view.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8))
        columns = {
            "label": int(source.labels[view]),
            "camera_to_world": camera_to_world.numpy(),
            "codec_psnr": codec_psnr,
            "intrinsics": intrinsics.numpy(),
        }
        return Sample(members, columns)


def _without_background(source: ViewSource, index: int, view: Tensor, image: Tensor) -> Tensor:
    """The view [4, H, W]; a picture without alpha is cut out, where its background is plain."""
    background = None if view[3].any() else source.background(index)
    return view if background is None else cut_out(image, background)


def _padded(batch: Tensor, size: int) -> Tensor:
    """Pad `batch` to `size` rows by repeating the last, so that rounding does not depend on the batch's length."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


def _why_not_finite(codec: Codec, moments: Tensor) -> str:
    """What is wrong with moments that are not finite in float16, and the remedy."""
    identity = codec.identity()
    if moments.isfinite().all():
        return (
            f"the latent reaches {float(moments.abs().amax()):.3g}, more than float16 holds; correct the codec's scale "
            f"(latent_scale {identity['latent_scale']}; for a VAE scaling_factor in its config.json)"
        )
    if identity.get("dtype") == "bfloat16":
        return "the latent is not finite in bfloat16; set codec.dtype: fp32"
    return "the latent is not finite; the codec's weights are damaged or not made for such pictures, give another"


@torch.no_grad()
def _codec_psnr(codec: Codec, moments: Tensor, images: Tensor, batch: int) -> list[float]:
    """PSNR in dB of every image against its decoded, stored latent mean."""
    decoded = codec.decode(_padded(latent_mean(moments.float()), batch))[: len(images)]
    return psnr(decoded, images).tolist()


def _meta(source: ViewSource, view: int) -> dict[str, Any]:
    intrinsics = source.intrinsics(view)
    return {
        "fx": intrinsics.fx,
        "fy": intrinsics.fy,
        "cx": intrinsics.cx,
        "cy": intrinsics.cy,
        "width": intrinsics.width,
        "height": intrinsics.height,
        "label": int(source.labels[view]),
        "radius": float(camera_radius(source.camera_to_world[view])),
    }


def _npy(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tensor.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _png(image: Tensor) -> bytes:
    pixels = (image.permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------ samples to disk


def map_ahead(
    pool: Executor, function: Callable[[Item], Result], items: Iterable[Item], depth: int
) -> Iterator[Result]:
    """function(item) of every item, in order, computed by the pool at most `depth` items ahead."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def write_shards(
    shards: Sequence[Shard],
    make: SampleMaker,
    out: Path,
    pool: Executor,
    depth: int,
    count: Callable[[int], None],
    stop: threading.Event,
) -> dict[str, BuiltShard]:
    """Build these shards one after the other, and measure those that are complete already; the results by name.

    `pool` makes samples up to `depth` batches ahead, across shards. `count` is called with the number of samples as
    they are written. Once `stop` is set, the unfinished shard is dropped and the rest is left out.
    """
    missing = {shard.name for shard in shards if not shard.index(out).exists()}
    batches = (batch for shard in shards if shard.name in missing for batch in make.batches(shard))
    made = map_ahead(pool, make, batches, depth)
    written = {}
    with suppress(_Stopped):
        for shard in shards:
            if stop.is_set():
                raise _Stopped
            if shard.name in missing:
                _write_shard(shard, _next_samples(made, len(shard), count, stop), out)
            written[shard.name] = _measure(shard, out)
    return written


class _Stopped(Exception):
    """Building was asked to stop; the unfinished shard is dropped."""


def _next_samples(
    made: Iterator[list[Sample]], samples: int, count: Callable[[int], None], stop: threading.Event
) -> Iterator[Sample]:
    """The next `samples` samples of the batches."""
    while samples > 0:
        if stop.is_set():
            raise _Stopped
        batch = next(made)
        yield from batch
        samples -= len(batch)
        count(len(batch))


def _write_shard(shard: Shard, samples: Iterator[Sample], out: Path) -> None:
    """Stream the samples into the shard's tar, then write its index."""
    columns: list[dict[str, Any]] = []

    def members() -> Iterator[dict[str, Any]]:
        for sample in samples:
            columns.append(sample.columns)
            yield sample.members

    tar = shard.tar(out)
    write_atomically(tar, lambda path: _write_tar(path, members()))
    save_arrays(shard.index(out), _index(tar, columns))


def _write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        writer = webdataset.TarWriter(file, user="sitdist", group="sitdist", mode=0o644, mtime=0.0, encoder=False)
        for sample in samples:
            writer.write(sample)
        writer.close()


def _index(tar: Path, columns: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The index of a finished tar: the places of its members, read back from it, and the given columns."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key, _, name = member.name.partition(".")
            samples.setdefault(key, {})[name] = member
    rows = []
    with tar.open("rb") as file:
        for members, given in zip(samples.values(), columns, strict=True):
            start = min(member.offset for member in members.values())
            stop = max(member.offset_data + padded_size(member.size) for member in members.values())
            image = members.get(IMAGE_MEMBER)
            file.seek(start)
            places = {
                "start": start,
                "stop": stop,
                "crc32": zlib.crc32(file.read(stop - start)),
                "moments": members["moments.npy"].offset_data,
                "packed_pose": members["packed_pose.npy"].offset_data,
                "image": image.offset_data if image else 0,
                "image_bytes": image.size if image else 0,
            }
            if VIEW_MEMBER in members:
                places["view"] = members[VIEW_MEMBER].offset_data
            rows.append(places | given)
    kinds = {name: kind for name, (kind, _) in INDEX_FIELDS.items() if name in rows[0]}
    return {name: np.asarray([row[name] for row in rows], kind) for name, kind in kinds.items()}


def _measure(shard: Shard, out: Path) -> BuiltShard:
    """Sizes and hashes of a complete shard."""
    tar, index = shard.tar(out), shard.index(out)
    entry = ShardEntry(
        name=tar.name,
        count=len(shard),
        bytes=tar.stat().st_size,
        sha256=file_sha256(tar),
        index_sha256=file_sha256(index),
    )
    return BuiltShard(entry, load_index(index)["codec_psnr"].tolist() if shard.split.keeps_images else [])
