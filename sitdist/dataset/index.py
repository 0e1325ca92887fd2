"""The index of a shard: where each sample's members lie in the tar, checked before use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sitdist.dataset.format import (
    BLOCK,
    BUILD_AGAIN,
    INDEX_FIELDS,
    META_BYTES,
    OPTIONAL_FIELDS,
    PSNR,
    RADIUS_TOLERANCE,
    npy_size,
    sample_key,
)
from sitdist.dataset.manifest import DatasetManifest, ShardEntry
from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import FOCAL_RANGE, MAX_OFFSET, camera_radius
from sitdist.geometry.pose import are_rigid, check_rigid
from sitdist.io.arrays import load_arrays


def load_index(path: Path, count: int | None = None) -> dict[str, np.ndarray]:
    """The columns of a shard's index, each with one entry per sample; DataError if the file is damaged.

    `count`: the number of samples according to the manifest.
    """
    index = load_arrays(path, BUILD_AGAIN)
    if index.keys() | OPTIONAL_FIELDS != INDEX_FIELDS.keys():
        raise DataError(f"{path}: damaged (holds {', '.join(index)[:160]}); {BUILD_AGAIN}")
    length = index["start"].size if count is None else count
    for name, column in index.items():
        kind, shape = INDEX_FIELDS[name]
        if column.dtype != np.dtype(kind) or column.shape != (length, *shape):
            found = f"{column.dtype} {list(column.shape)}"
            raise DataError(f"{path}: damaged ({name} is {found}, not of {length} samples); {BUILD_AGAIN}")
    return index


def check_index(
    index: Mapping[str, np.ndarray], manifest: DatasetManifest, split: str, shard: ShardEntry, first: int
) -> None:
    """DataError where the index of a shard, whose first sample is `first`, contradicts the manifest.

    Reads no sample: offsets, labels, poses, intrinsics and the codec's round trip are checked for all rows at once.
    """
    start, stop, image, image_bytes = (index[name] for name in ("start", "stop", "image", "image_bytes"))
    least, most = manifest.sample_bytes()
    most_of_image = 4 * manifest.image_size**2 + META_BYTES
    arrays = {name: array for name, array in manifest.arrays().items() if name != "camera_to_world"}
    if not arrays.keys() <= index.keys():
        raise DataError("has no places of the views, which the recipe's keep_views promises")
    placed = np.logical_and.reduce([_inside(index, name, npy_size(*array)) for name, array in arrays.items()])
    psnr, unknown = index["codec_psnr"], np.isnan(index["codec_psnr"])
    if split == "train":
        pictured, measured = (image == 0) & (image_bytes == 0), unknown
    else:
        pictured = _inside(index, "image", image_bytes) & (image_bytes > 0) & (image_bytes <= most_of_image)
        measured = unknown if unknown.all() else (psnr > PSNR[0] - 1e-3) & (psnr < PSNR[1] + 1e-3)
    labels = [each.label for each in manifest.objects if each.views.get(split, 0)]
    poses, (low, high) = torch.from_numpy(index["camera_to_world"]), manifest.splits[split].radius
    rigid, radius = are_rigid(poses).numpy(), camera_radius(poses).numpy()
    outside = (radius < low * (1 - RADIUS_TOLERANCE)) | (radius > high * (1 + RADIUS_TOLERANCE))
    wrong = {
        "does not begin where the one before it ends": start != np.concatenate([[0], stop[:-1]]),
        f"does not lie in the {shard.bytes:,} bytes of the tar": (start < 0) | (stop < 0) | (stop > shard.bytes),
        "has another size than its arrays and its picture": (stop - start < least)
        | (stop - start > most + np.where(pictured, image_bytes, 0)),
        "has an array outside of it": ~placed,
        "has a picture outside of it, or one of an impossible size": ~pictured,
        f"has a label that no object of {split} has": ~np.isin(index["label"], labels),
        f"has a camera outside of the split's radius {[low, high]}": rigid & outside,
        "has a codec_psnr that no round trip gives": ~measured,
        "has intrinsics that no camera has": ~_are_intrinsics(index),
    }
    for what, rows in wrong.items():
        if rows.any():
            raise DataError(f"sample {sample_key(first + int(rows.argmax()))} {what}")
    if not rigid.all():
        row = int((~rigid).argmax())
        try:
            check_rigid(poses[row], f"sample {sample_key(first + row)}")
        except PoseError as error:
            raise DataError(str(error)) from None


def _inside(index: Mapping[str, np.ndarray], field: str, size: int | np.ndarray) -> np.ndarray:
    """Whether each member of `size` bytes lies, behind a header, where a member of its sample can."""
    at = index[field]
    return (at % BLOCK == 0) & (at >= index["start"] + BLOCK) & (at + size <= index["stop"])


def _are_intrinsics(index: Mapping[str, np.ndarray]) -> Any:
    """Whether the intrinsics of each sample are within the bounds of `check_intrinsics`; NaN is not."""
    if "intrinsics" not in index:
        return np.ones(len(index["start"]), dtype=bool)
    focal, centre = index["intrinsics"][:, :2], index["intrinsics"][:, 2:]
    low, high = FOCAL_RANGE[0] * (1 - 1e-9), FOCAL_RANGE[1] * (1 + 1e-9)  # dividing by the picture's size rounds
    inside = (focal >= low) & (focal <= high) & (np.abs(centre - 0.5) <= MAX_OFFSET * (1 + 1e-9))
    return inside.all(axis=1)


def check_split(columns: Mapping[str, np.ndarray], manifest: DatasetManifest, split: str) -> None:
    """DataError where the joined indexes of a split contradict what the manifest says of the split."""
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
