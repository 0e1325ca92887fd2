"""The manifest of a dataset: its schema, the checks that it passes before use, and how it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from sitdist.dataset.format import (
    BLOCK,
    BUILD_AGAIN,
    INDEX_FIELDS,
    META_BYTES,
    PSNR,
    Label,
    Size,
    StrictModel,
    first_problem,
    npy_size,
    padded_size,
)
from sitdist.errors import DataError
from sitdist.io.files import parse_json, read_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
MAX_SAMPLES = 10**9  # per split: the keys have nine digits
MAX_SHARD = 10**7  # samples per shard: the order of a window of shards is allocated before they are opened
MAX_LATENT = 2**26  # numbers in the moments of one sample
ROW_BYTES = sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in INDEX_FIELDS.values())
Count = Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
Share = Annotated[float, Field(ge=0, le=1)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=100)]
TarName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar$", max_length=100)]
CodecFile = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
]


class ShardEntry(StrictModel):
    """One tar and its index, by name, size and SHA-256."""

    name: TarName
    count: Annotated[int, Field(ge=1, le=MAX_SHARD)]
    bytes: Size
    sha256: Hash
    index_sha256: Hash


class CameraFacts(StrictModel):
    """What holds for every view of a split, as measured when it was built.

    `looks_at_origin`: the optical axis meets the world's origin, in front of the camera; `upright`: the x axis is level
    and the y axis does not point down (both to 1e-4); `same_intrinsics`: one camera took all views.
    """

    looks_at_origin: bool
    upright: bool
    same_intrinsics: bool


class SplitEntry(StrictModel):
    """The shards of a split in the order of the keys, the range of its cameras' radii, and what its cameras share.

    `radius_augmented`: the number of views that are zoomed copies of others.
    """

    count: Size
    radius: Annotated[tuple[float, float], Field(strict=False)]
    radius_augmented: Count = 0
    shards: list[ShardEntry]  # none in the manifest of an exported model
    cameras: CameraFacts | None = None  # None: built as format version 1, which did not look

    @model_validator(mode="after")
    def _consistent(self) -> SplitEntry:
        if self.count > MAX_SAMPLES:
            raise ValueError(
                f"count {self.count:,}: at most {MAX_SAMPLES:,} samples are read; the indexes of so many need "
                f"{self.count * ROW_BYTES / 1e9:,.0f} GB of memory"
            )
        held = sum(shard.count for shard in self.shards)
        if self.shards and held != self.count:
            raise ValueError(f"shards of {held} samples but count {self.count}")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        if not 0 <= self.radius[0] <= self.radius[1]:
            raise ValueError(f"radius {list(self.radius)} is no range")
        if self.radius_augmented > self.count:
            raise ValueError(f"radius_augmented {self.radius_augmented} of {self.count}")
        return self


class ObjectEntry(StrictModel):
    """One object: its label, its name, and its number of views in every split.

    `similarity` maps the frame of its capture to the frame of the poses, where they differ: scale, rotation [3, 3] and
    translation [3] of x -> scale * rotation @ x + translation. `background`: the colour behind the object, if known.
    """

    label: Label
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    views: dict[SplitName, Count]
    similarity: dict[str, Any] | None
    background: Annotated[tuple[Share, Share, Share], Field(strict=False)] | None = None  # of its views, if known

    @field_validator("similarity")
    @classmethod
    def _usable(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        if values is not None:
            _arrays(values, {"scale": (), "rotation": (3, 3), "translation": (3,)})
            from sitdist.geometry.similarity import Similarity  # torch is slow to import

            Similarity.from_dict(values)
        return values


class LatentShape(StrictModel):
    """Shape of one latent: channels x height x width."""

    channels: Size
    height: Size
    width: Size

    @model_validator(mode="after")
    def _bounded(self) -> LatentShape:
        numbers = math.prod(self.moments)
        if numbers > MAX_LATENT:
            raise ValueError(
                f"{self.channels}x{self.height}x{self.width}: the moments of one sample need {numbers / 5e8:,.1f} GB "
                f"of memory; at most {MAX_LATENT / 5e8:.1f} GB are read"
            )
        return self

    @property
    def moments(self) -> tuple[int, int, int]:
        """The shape of the moments of one sample."""
        return 2 * self.channels, self.height, self.width


class CodecPsnr(StrictModel):
    """Mean PSNR (dB) of the codec's round trip over n views that the codec was not fitted on."""

    mean: Annotated[float, Field(ge=PSNR[0], le=PSNR[1])]
    n: Annotated[int, Field(ge=1)]
    split: SplitName


class DatasetManifest(StrictModel):
    """manifest.json. It is written last, so a dataset that has it is complete."""

    format_version: int
    name: Annotated[str, Field(pattern="^[A-Za-z0-9._-]+$")]
    recipe: dict[str, Any]
    sources: dict[SplitName, Annotated[str, Field(min_length=1, max_length=100)]]
    image_size: Annotated[int, Field(ge=1, le=2**14)]
    objects: Annotated[list[ObjectEntry], Field(min_length=1)]
    statistics: dict[str, Any]
    codec: dict[str, Any]
    codec_files: dict[CodecFile, Hash]
    latent: LatentShape
    codec_psnr: CodecPsnr | None
    splits: dict[SplitName, SplitEntry]

    @field_validator("statistics")
    @classmethod
    def _usable(cls, statistics: dict[str, Any]) -> dict[str, Any]:
        shapes = {"rotation": (3, 3), "translation": (3,)} | (
            {"intrinsics": (4,)} if "intrinsics" in statistics else {}
        )
        if statistics.keys() != shapes.keys():
            raise ValueError(f"of {', '.join(statistics)}; expected {', '.join(shapes)}")
        for name, shape in shapes.items():
            _arrays(statistics[name], {"mean": shape, "std": shape})
            if not (np.asarray(statistics[name]["std"]) > 0).all():
                raise ValueError("a deviation is not positive")
        return statistics

    @field_validator("recipe")
    @classmethod
    def _with_sources(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        splits = recipe.get("splits")
        sources = splits.get("train") if isinstance(splits, dict) else None
        listed = sources if isinstance(sources, list) else [sources]
        if not listed or not all(isinstance(each, dict) and isinstance(each.get("kind"), str) for each in listed):
            raise ValueError("splits.train is no source, nor a list of them")
        return recipe

    @model_validator(mode="after")
    def _consistent(self) -> DatasetManifest:
        """Check that the keys agree with each other."""
        latent, size = self.latent, self.image_size
        if "train" not in self.splits:
            raise ValueError("splits has no train")
        if self.recipe.get("image_size") != size:
            raise ValueError(f"image_size {size} but the recipe's is {self.recipe.get('image_size')!r:.40}")
        kind, channels, factor = (self.codec.get(key) for key in ("kind", "channels", "downsample"))
        if not isinstance(kind, str) or type(channels) is not int or type(factor) is not int:
            raise ValueError("codec has no kind, channels and downsample")
        if latent.channels != channels or not latent.height * factor == latent.width * factor == size:
            raise ValueError(
                f"latent {latent.channels}x{latent.height}x{latent.width} is not what a codec of {channels} channels "
                f"that shrinks by {factor} makes of {size}x{size} pixels"
            )
        if len({entry.label for entry in self.objects}) < len(self.objects):
            raise ValueError("objects has a label twice")
        if {name for entry in self.objects for name in entry.views} - self.splits.keys():
            raise ValueError("objects has views of a split that is not there")
        for name, split in self.splits.items():
            views = sum(entry.views.get(name, 0) for entry in self.objects)
            if views != split.count:
                raise ValueError(f"objects has {views} views in {name}, but that has {split.count}")
            for shard in split.shards:
                if shard.bytes < shard.count * self.sample_bytes()[0]:
                    raise ValueError(
                        f"splits.{name}: {shard.name} cannot hold {shard.count} samples in {shard.bytes} bytes"
                    )
        psnr = self.codec_psnr
        if psnr is not None and (psnr.split not in self.splits or psnr.n != self.splits[psnr.split].count):
            raise ValueError(f"codec_psnr is of {psnr.n} views of {psnr.split}, which are not there")
        return self

    def sample_bytes(self) -> tuple[int, int]:
        """Least and most bytes of a sample in a tar, without its picture."""
        arrays = sum(BLOCK + padded_size(npy_size(*array)) for array in self.arrays().values())
        return arrays + 2 * BLOCK, arrays + META_BYTES

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each .npy member of a sample."""
        view = {"view": ("|u1", (4, self.image_size, self.image_size))} if self.keeps_views else {}
        return {
            "camera_to_world": ("<f8", (4, 4)),
            "moments": ("<f2", self.latent.moments),
            "packed_pose": ("<f4", (4, 4)),
            **view,
        }

    @property
    def keeps_views(self) -> bool:
        """Whether every sample holds its view without the background."""
        return self.recipe.get("keep_views", False) is True

    def backgrounds(self) -> dict[int, tuple[float, float, float]]:
        """The colour behind each object, by label, where it is known."""
        return {entry.label: entry.background for entry in self.objects if entry.background is not None}

    def labels(self) -> int:
        """The number of labels that a model must know: one more than the largest."""
        return 1 + max(entry.label for entry in self.objects)

    def train_sources(self) -> list[dict[str, Any]]:
        """The sources of the training split, as the recipe lists them."""
        given = self.recipe["splits"]["train"]
        return given if isinstance(given, list) else [given]


def load_manifest(folder: str | Path) -> DatasetManifest:
    """The manifest of a finished dataset; DataError if there is none, or of another format."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        half = (
            " (a build was begun there; run the same command again)" if (Path(folder) / "build.json").is_file() else ""
        )
        raise DataError(f"{folder}: no dataset: {path.name} is missing{half}; make one with `sitdist shards build`")
    manifest = read_manifest(path)
    if not all(split.shards for split in manifest.splits.values()):
        raise DataError(f"{path}: lists no shards, as in an exported model; give the folder of a dataset")
    return manifest


def read_manifest(path: Path, name: str | None = None) -> DatasetManifest:
    """The manifest in a file, of format version 1 or 2; `name` is what errors call the file.

    DataError if it is damaged, has another version, or contradicts itself.
    """
    values = read_json(path, BUILD_AGAIN) if name is None else parse_json(path.read_bytes(), name, BUILD_AGAIN)
    name = name or str(path)
    version = values.get("format_version")
    if type(version) is not int:
        raise DataError(f"{name}: damaged (format_version {str(version)[:40]}); {BUILD_AGAIN}")
    if version not in (1, FORMAT_VERSION):
        remedy = "update sitdist" if version > FORMAT_VERSION else BUILD_AGAIN
        raise DataError(f"{name}: format_version {version} but this sitdist reads {FORMAT_VERSION}; {remedy}")
    try:
        return DatasetManifest.model_validate(_from_version_1(values) if version == 1 else values)
    except ValidationError as error:
        raise DataError(f"{name}: damaged ({first_problem(error)}); {BUILD_AGAIN}") from None
    except (AttributeError, KeyError, TypeError) as error:  # of version 1, not even that
        raise DataError(f"{name}: damaged ({error!r:.160}); {BUILD_AGAIN}") from None


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a manifest of format version 1, whose splits had one source and so one object each, to version 2."""
    labels = {name: source["label"] for name, source in values["recipe"]["splits"].items()}
    views: dict[int, dict[str, int]] = {}
    for name, split in values["splits"].items():
        views.setdefault(labels.get(name, labels["train"]), {})[name] = split["count"]  # val may be held out of train
    objects = [
        {"label": label, "name": f"object {label}", "views": counts, "similarity": None}
        for label, counts in sorted(views.items())
    ]
    return {**values, "format_version": FORMAT_VERSION, "objects": objects}


def _arrays(values: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `values` holds finite arrays of these names and shapes, as lists, and nothing else."""
    if not isinstance(values, dict) or values.keys() != shapes.keys():
        raise ValueError(f"not {' and '.join(shapes)}")
    for name, shape in shapes.items():
        try:
            array = np.asarray(values[name])
            usable = array.shape == shape and array.dtype.kind in "fi" and bool(np.isfinite(array).all())
        except ValueError:  # ragged
            usable = False
        if not usable:
            raise ValueError(f"{name} is not {list(shape)} finite numbers")
