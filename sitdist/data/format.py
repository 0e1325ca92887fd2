"""What a dataset on disk looks like; shards/README.md is the same in prose.

    manifest.json   provenance.json   codec/   SPLIT/00000.tar   SPLIT/00000.index.npz   ...

Sample i of a split has the key f"{i:09d}". Its members lie side by side in the tar, and the index says where.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from sitdist.errors import DataError
from sitdist.geometry.packing import PoseStatistics

FORMAT_VERSION = 2
MEMBERS = ("camera_to_world.npy", "meta.json", "moments.npy", "packed_pose.npy")
IMAGE_MEMBER = "image.png"  # in every split but train

INDEX_FIELDS = {
    "start": np.int64,  # first byte of the sample's first tar header
    "stop": np.int64,  # one past the last padding byte of its last member
    "crc32": np.uint32,  # of all bytes between
    "moments": np.int64,  # first byte of the .npy file
    "packed_pose": np.int64,
    "image": np.int64,  # 0 where there is none
    "image_bytes": np.int64,
    "label": np.int64,
    "camera_to_world": np.float64,  # [n, 4, 4]
    "codec_psnr": np.float64,  # NaN where no image is kept
}


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShardEntry(_Entry):
    """One tar and its index, by name, size and SHA-256."""

    name: str
    count: int
    bytes: int
    sha256: str
    index_sha256: str


class CameraFacts(_Entry):
    """What holds for every view of a split, as measured: what a pose need not say, and what it says besides.

    `looks_at_origin`: the optical axis meets the world's origin, in front of the camera; `upright`: the x axis is level
    and the y axis does not point down (both to 1e-4); `same_intrinsics`: one camera took all views.
    """

    looks_at_origin: bool
    upright: bool
    same_intrinsics: bool


class SplitEntry(_Entry):
    """The shards of a split, in the order of the keys, the range of its cameras' radii, and what its cameras share.

    `radius_augmented`: how many of its views are zoomed copies of others.
    """

    count: int
    radius: tuple[float, float]
    radius_augmented: int = 0
    shards: list[ShardEntry]
    cameras: CameraFacts | None = None  # None: built as format version 1, which did not look


class ObjectEntry(_Entry):
    """One object: its label, its name, its views in every split.

    `similarity` is what took the frame of its capture to that of the poses, where they were moved: scale, rotation
    [3, 3] and translation [3] of x -> scale * rotation @ x + translation.
    """

    label: int
    name: str
    views: dict[str, int]
    similarity: dict[str, Any] | None


class LatentShape(_Entry):
    """Of one latent: channels x height x width."""

    channels: int
    height: int
    width: int


class CodecPsnr(_Entry):
    """Mean over n views of the PSNR (dB) of the codec's round trip, on views that the codec was not fitted on."""

    mean: float
    n: int
    split: str


class DatasetManifest(_Entry):
    """manifest.json: written last, so a dataset that has it is complete."""

    format_version: int
    name: str
    recipe: dict[str, Any]
    sources: dict[str, str]
    image_size: int
    objects: list[ObjectEntry]
    statistics: dict[str, Any]
    codec: dict[str, Any]
    codec_files: dict[str, str]
    latent: LatentShape
    codec_psnr: CodecPsnr | None
    splits: dict[str, SplitEntry]

    @field_validator("statistics")
    @classmethod
    def _usable(cls, statistics: dict[str, Any]) -> dict[str, Any]:
        try:
            usable = bool((PoseStatistics.from_dict(statistics).std > 0).all())
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"not the mean and deviation of rotation, translation and intrinsics: {error!r}") from None
        if not usable:
            raise ValueError("a deviation is not positive")
        return statistics

    def labels(self) -> int:
        """How many labels a model must know: one more than the largest."""
        return 1 + max(entry.label for entry in self.objects)


def load_manifest(folder: str | Path) -> DatasetManifest:
    """The manifest of a finished dataset; DataError if there is none, or of another format."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        half = (
            " (a build was begun there; run the same command again)" if (Path(folder) / "build.json").is_file() else ""
        )
        raise DataError(f"{folder}: no dataset: {path.name} is missing{half}; make one with `sitdist shards build`")
    return read_manifest(path)


def read_manifest(path: Path) -> DatasetManifest:
    """The manifest in a file, of this format version or the one before; DataError if it is damaged or of another."""
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version == 1:
            values = _from_version_1(values)
        elif version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version {version} but this sitdist reads {FORMAT_VERSION}; "
                + ("update sitdist" if version > FORMAT_VERSION else "build the dataset again")
            )
        return DatasetManifest.model_validate(values)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: damaged ({reason}); build the dataset again") from None


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format version 1, whose splits had one source and so one object each, as one of version 2."""
    labels = {name: source["label"] for name, source in values["recipe"]["splits"].items()}
    views: dict[int, dict[str, int]] = {}
    for name, split in values["splits"].items():
        views.setdefault(labels.get(name, labels["train"]), {})[name] = split["count"]  # val may be held out of train
    objects = [
        {"label": label, "name": f"object {label}", "views": counts, "similarity": None}
        for label, counts in sorted(views.items())
    ]
    return {**values, "format_version": FORMAT_VERSION, "objects": objects}


def load_index(path: Path) -> dict[str, np.ndarray]:
    """The fields of one shard's index, each of the shard's length; DataError if damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = {name: arrays[name].astype(dtype, casting="no") for name, dtype in INDEX_FIELDS.items()}
    except Exception as error:
        raise DataError(f"{path}: missing or damaged index ({error}); build the dataset again") from None
    return index
