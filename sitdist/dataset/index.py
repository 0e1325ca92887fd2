"""A shard's index: where each sample's members lie in its tar, checked before use."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from sitdist.dataset.format import (
    BLOCK,
    BUILD_AGAIN,
    INDEX_FIELDS,
    META_BYTES,
    PSNR,
    RADIUS_TOLERANCE,
    npy_size,
    parse_npy,
)
from sitdist.dataset.manifest import DatasetManifest, ShardEntry
from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import camera_radius
from sitdist.geometry.pose import are_rigid, check_rigid
from sitdist.io.files import open_file


def load_index(path: Path, count: int | None = None) -> dict[str, np.ndarray]:
    """The fields of one shard's index, each of the shard's length; DataError if damaged.

    No more is allocated than the file holds. `count`: the length that the manifest names.
    """
    with open_file(path, BUILD_AGAIN) as opened:
        try:
            return _parse_index(opened, count)
        except Exception as error:  # zipfile has many
            raise DataError(f"{path}: damaged index ({str(error)[:200]}); {BUILD_AGAIN}") from None


def _parse_index(opened: BinaryIO, count: int | None) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(opened) as file:
        entries = {entry.filename: entry for entry in file.infolist()}
        if entries.keys() != {f"{name}.npy" for name in INDEX_FIELDS} or len(file.infolist()) > len(entries):
            raise ValueError(f"holds {', '.join(entries)[:160]}")
        length = (entries["start.npy"].file_size - npy_size("<i8", (0,))) // 8 if count is None else count
        index = {}
        for name, dtype in INDEX_FIELDS.items():
            shape, entry = (length, 4, 4) if name == "camera_to_world" else (length,), entries[f"{name}.npy"]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            if entry.file_size != npy_size(dtype, shape) or entry.file_size > os.fstat(opened.fileno()).st_size:
                raise ValueError(f"{name} is not of {length} samples")
            index[name] = parse_npy(file.read(entry), dtype, shape)
    return index


def check_index(
    index: Mapping[str, np.ndarray], manifest: DatasetManifest, split: str, shard: ShardEntry, first: int
) -> None:
    """DataError where the index of a shard, whose first sample is `first`, cannot be that of the manifest.

    Looks at no sample: places, labels, poses and the codec's round trip, all at once.
    """
    start, stop, image, image_bytes = (index[name] for name in ("start", "stop", "image", "image_bytes"))
    least, most = manifest.sample_bytes()
    most_of_image = 4 * manifest.image_size**2 + META_BYTES
    placed = np.logical_and.reduce(
        [_inside(index, name, npy_size(*manifest.arrays()[name])) for name in ("moments", "packed_pose")]
    )
    psnr, unknown = index["codec_psnr"], np.isnan(index["codec_psnr"])
    if split == "train":
        pictured, measured = (image == 0) & (image_bytes == 0), unknown
    else:
        pictured = _inside(index, "image", image_bytes) & (image_bytes > 0) & (image_bytes <= most_of_image)
        measured = unknown if unknown.all() else (psnr > PSNR[0] - 1e-3) & (psnr < PSNR[1] + 1e-3)
    labels = [each.label for each in manifest.objects if each.views.get(split, 0)]
    poses, (low, high) = torch.from_numpy(index["camera_to_world"]), manifest.splits[split].radius
    rigid, radius = are_rigid(poses).numpy(), camera_radius(poses).numpy()
    beside = (radius < low * (1 - RADIUS_TOLERANCE)) | (radius > high * (1 + RADIUS_TOLERANCE))
    wrong = {
        "does not begin where the one before it ends": start != np.concatenate([[0], stop[:-1]]),
        f"does not lie in the {shard.bytes:,} bytes of the tar": (start < 0) | (stop < 0) | (stop > shard.bytes),
        "has another size than its arrays and its picture": (stop - start < least)
        | (stop - start > most + np.where(pictured, image_bytes, 0)),
        "has an array outside of it": ~placed,
        "has a picture outside of it, or of a size that none has": ~pictured,
        f"has a label that no object of {split} has": ~np.isin(index["label"], labels),
        f"has a camera outside of the split's radius {[low, high]}": rigid & beside,
        "has a codec_psnr that no round trip gives": ~measured,
    }
    for what, rows in wrong.items():
        if rows.any():
            raise DataError(f"sample {first + int(rows.argmax()):09d} {what}")
    if not rigid.all():
        row = int((~rigid).argmax())
        try:
            check_rigid(poses[row], f"sample {first + row:09d}")
        except PoseError as error:
            raise DataError(str(error)) from None


def _inside(index: Mapping[str, np.ndarray], field: str, size: int | np.ndarray) -> np.ndarray:
    """Whether each member of `size` bytes lies, behind a header, where a member of its sample can."""
    at = index[field]
    return (at % BLOCK == 0) & (at >= index["start"] + BLOCK) & (at + size <= index["stop"])


def check_split(columns: Mapping[str, np.ndarray], manifest: DatasetManifest, split: str) -> None:
    """DataError where the indexes of a whole split, one behind the other, are not what the manifest says of it."""
    entry, psnr = manifest.splits[split], manifest.codec_psnr
    radius = camera_radius(torch.from_numpy(columns["camera_to_world"]))
    found = (float(radius.min()), float(radius.max()))
    if not np.allclose(found, entry.radius, rtol=RADIUS_TOLERANCE, atol=0.0):
        raise DataError(f"radius {list(entry.radius)} but its cameras have {list(found)}")
    for each in manifest.objects:
        views = int((columns["label"] == each.label).sum())
        if views != each.views.get(split, 0):
            raise DataError(f"{each.views.get(split, 0)} views of object {each.label} but {views} have its label")
    if psnr is not None and psnr.split == split:
        mean = float(columns["codec_psnr"].mean())
        if not math.isclose(mean, psnr.mean, rel_tol=1e-6):
            raise DataError(f"codec_psnr {psnr.mean} but the mean of its views is {mean}")
