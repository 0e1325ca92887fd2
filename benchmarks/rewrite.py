"""Copies a dataset with other latents or another standardization of the poses, without its sources."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sitdist.dataset.format import BUILD_AGAIN, index_name
from sitdist.dataset.manifest import ShardEntry, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import open_store
from sitdist.errors import DataError
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.atomic import file_sha256, write_atomically
from sitdist.io.files import open_file

NewMoments = Callable[[ShardReader, list[int]], Tensor]  # of samples of a split, [B, 2C, h, w]


def rewrite(
    dataset: Path, out: Path, name: str, statistics: PoseStatistics | None = None, moments: NewMoments | None = None
) -> None:
    """Write the dataset `out`, called `name`: every sample of `dataset`, its pose standardized by `statistics` and its
    latent replaced by `moments`, where they are given.

    The samples keep their places, so that only hashes and checksums change. With other latents, codec_psnr is removed.
    The manifest is written last.
    """
    store = open_store(dataset)
    manifest = load_manifest(store.folder)
    for file, sha256 in manifest.codec_files.items():
        with open_file(store.path(f"codec/{file}", sha256), BUILD_AGAIN) as opened:
            data = _read(opened, sha256)
        write_atomically(out / "codec" / file, partial(Path.write_bytes, data=data))
    splits = {}
    for split, entry in manifest.splits.items():
        reader, shards, first = ShardReader(store, split), [], 0
        for number, shard in enumerate(entry.shards):
            indices = list(range(first, first + shard.count))
            members = {} if moments is None else {"moments": moments(reader, indices).to(torch.float16)}
            if statistics is not None:
                poses = reader.camera_to_world()[indices]
                members["packed_pose"] = standardize(poses, statistics, reader.intrinsics(indices)).float()
            shards.append(_rewrite_shard(reader, number, out / split, members))
            first += shard.count
        splits[split] = entry.model_copy(update={"shards": shards})
    changes: dict[str, Any] = {"name": name, "splits": splits}
    changes |= {} if statistics is None else {"statistics": statistics.to_dict()}
    changes |= {} if moments is None else {"codec_psnr": None}
    text = manifest.model_copy(update=changes).model_dump_json(indent=1) + "\n"
    write_atomically(out / "manifest.json", lambda path: path.write_text(text))


def _read(file: BinaryIO, sha256: str) -> bytearray:
    """The bytes of a file; DataError if they are not those that the manifest names: what is written gets new hashes."""
    data = bytearray(file.read())
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{file.name}: altered; `sitdist shards verify` tells more, {BUILD_AGAIN}")
    return data


def _rewrite_shard(reader: ShardReader, number: int, out: Path, members: dict[str, Tensor]) -> ShardEntry:
    """A shard with some .npy members, one of every sample each, replaced by others of the same type and shape."""
    shard, index = reader.shards[number], reader.index(number)
    with reader.open_tar(number) as file:
        data = _read(file, shard.sha256)
    for field, values in members.items():
        for at, value in zip(index[field].tolist(), values, strict=True):
            npy = _npy(value)
            data[at : at + len(npy)] = npy
    places = zip(index["start"].tolist(), index["stop"].tolist(), strict=True)
    index["crc32"] = np.asarray([zlib.crc32(data[start:stop]) for start, stop in places], dtype=np.uint32)
    if "moments" in members:
        index["codec_psnr"] = np.full_like(index["codec_psnr"], np.nan)
    write_atomically(out / shard.name, lambda path: path.write_bytes(data))
    write_atomically(out / index_name(shard.name), lambda path: _save(path, index))
    hashes = {"sha256": file_sha256(out / shard.name), "index_sha256": file_sha256(out / index_name(shard.name))}
    return shard.model_copy(update=hashes)


def _npy(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, tensor.contiguous().numpy(), allow_pickle=False)
    return file.getvalue()


def _save(path: Path, index: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **index)  # type: ignore[arg-type]
