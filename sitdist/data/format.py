"""What a dataset on disk looks like; shards/README.md is the same in prose.

    manifest.json   provenance.json   codec/   SPLIT/00000.tar   SPLIT/00000.index.npz   ...

Sample i of a split has the key f"{i:09d}". Its members lie side by side in the tar, and the index says where.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sitdist.errors import DataError, PoseError
from sitdist.geometry.camera import Intrinsics, camera_radius, check_intrinsics
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.pose import are_rigid, check_rigid
from sitdist.geometry.similarity import Similarity
from sitdist.io.files import open_file
from sitdist.io.json_file import parse_json, read_json

MANIFEST = "manifest.json"
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


BUILD_AGAIN = "build the dataset again"
MAX_SAMPLES = 10**9  # of a split: the keys have nine digits
MAX_SHARD = 10**7  # of a shard: what shuffles a window of shards is allocated before they are opened
MAX_LATENT = 2**26  # numbers in the moments of one sample
ROW_BYTES = sum(
    np.dtype(dtype).itemsize * (16 if name == "camera_to_world" else 1) for name, dtype in INDEX_FIELDS.items()
)
BLOCK = 512  # bytes; a tar's headers are one, and data is padded to whole ones
META_BYTES = 64 * BLOCK  # at most of meta.json, of all tar headers of a sample, and of padding
PSNR = (0.0, 100.0)  # dB, of pictures in [0, 1]; the mean square error is taken as at least 1e-10
RADIUS_TOLERANCE = 1e-6  # relative

Size = Annotated[int, Field(ge=1, le=2**50)]
Count = Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=100)]
TarName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar$", max_length=100)]
CodecFile = Annotated[
    str, Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)
]
Label = Annotated[int, Field(ge=0, lt=10**6)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ShardEntry(_Entry):
    """One tar and its index, by name, size and SHA-256."""

    name: TarName
    count: Annotated[int, Field(ge=1, le=MAX_SHARD)]
    bytes: Size
    sha256: Hash
    index_sha256: Hash


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


class ObjectEntry(_Entry):
    """One object: its label, its name, its views in every split.

    `similarity` is what took the frame of its capture to that of the poses, where they were moved: scale, rotation
    [3, 3] and translation [3] of x -> scale * rotation @ x + translation.
    """

    label: Label
    name: Annotated[str, Field(min_length=1, max_length=1000)]
    views: dict[SplitName, Count]
    similarity: dict[str, Any] | None

    @field_validator("similarity")
    @classmethod
    def _usable(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        if values is not None:
            _arrays(values, {"scale": (), "rotation": (3, 3), "translation": (3,)})
            Similarity.from_dict(values)
        return values


class LatentShape(_Entry):
    """Of one latent: channels x height x width."""

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


class CodecPsnr(_Entry):
    """Mean over n views of the PSNR (dB) of the codec's round trip, on views that the codec was not fitted on."""

    mean: Annotated[float, Field(ge=PSNR[0], le=PSNR[1])]
    n: Annotated[int, Field(ge=1)]
    split: SplitName


class DatasetManifest(_Entry):
    """manifest.json: written last, so a dataset that has it is complete."""

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
        if not (PoseStatistics.from_dict(statistics).std > 0).all():
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
        """What one key says of another."""
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
        """Least and most bytes that a sample takes in a tar, without its picture."""
        arrays = sum(BLOCK + _padded(npy_size(*array)) for array in self.arrays().values())
        return arrays + 2 * BLOCK, arrays + META_BYTES

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each .npy member of a sample."""
        return {
            "camera_to_world": ("<f8", (4, 4)),
            "moments": ("<f2", self.latent.moments),
            "packed_pose": ("<f4", (4, 4)),
        }

    def labels(self) -> int:
        """How many labels a model must know: one more than the largest."""
        return 1 + max(entry.label for entry in self.objects)


class SampleMeta(_Entry):
    """meta.json of a sample: the camera in pixels, the object's label, and the camera's distance to the origin."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: Size
    height: Size
    label: Label
    radius: Annotated[float, Field(ge=0)]

    @property
    def camera(self) -> Intrinsics:
        return Intrinsics(self.fx, self.fy, self.cx, self.cy, self.width, self.height)


# ------------------------------------------------------------------------------------------------------------ manifest


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
    """The manifest in a file, of this format version or the one before; DataError if it is damaged, of another, or
    contradicts itself. `name`: what errors call it.
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
        raise DataError(f"{name}: damaged ({_first(error)}); {BUILD_AGAIN}") from None
    except (AttributeError, KeyError, TypeError) as error:  # of version 1, not even that
        raise DataError(f"{name}: damaged ({error!r:.160}); {BUILD_AGAIN}") from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong: key, value and what is expected."""
    first = error.errors(include_url=False)[0]
    key, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        reason = "not a name or a hash as sitdist writes them"
    if first["type"] in ("value_error", "missing"):
        return f"{key}: {reason}"[:300] if key else reason[:300]
    return f"{key} = {first['input']!r:.60}: {reason[:1].lower()}{reason[1:]}"[:300]


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


# --------------------------------------------------------------------------------------------------------------- index


def index_name(tar: str) -> str:
    """The name of a tar's index."""
    return tar.removesuffix(".tar") + ".index.npz"


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


# ------------------------------------------------------------------------------------------------------------- samples


def npy_header(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """What stands before the numbers in an .npy file of version 1.0."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def npy_size(dtype: Any, shape: tuple[int, ...]) -> int:
    """Bytes of such a file."""
    return len(npy_header(dtype, shape)) + math.prod(shape) * np.dtype(dtype).itemsize


def parse_npy(data: bytes, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array in such a file; ValueError if it is of another type or shape."""
    header = npy_header(dtype, shape)
    if not data.startswith(header) or len(data) != npy_size(dtype, shape):
        raise ValueError(f"no {np.dtype(dtype)} array of {list(shape)} in .npy version 1.0")
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape).copy()


def parse_meta(data: bytes, image_size: int, where: str) -> SampleMeta:
    """meta.json of a sample, called `where` in errors; DataError if damaged, or of a picture of another size."""
    try:
        meta = SampleMeta.model_validate(parse_json(data, where, BUILD_AGAIN))
    except ValidationError as error:
        raise DataError(f"{where}: damaged ({_first(error)}); {BUILD_AGAIN}") from None
    if not meta.width == meta.height == image_size:
        raise DataError(f"{where}: {meta.width}x{meta.height} pixels but pictures have {image_size}; {BUILD_AGAIN}")
    check_intrinsics(meta.camera, where)
    return meta


def sample_members(data: bytes, key: str, names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    """name -> (where it begins, its bytes) of the members of one sample, whose part of the tar is `data`.

    ValueError unless they are plain files called KEY.NAME, each of `names` once, and fill `data`.
    """
    members: dict[str, tuple[int, bytes]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * BLOCK)), mode="r:") as file:
            for member in file:
                name = member.name.removeprefix(f"{key}.")
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
                    raise ValueError(f"{member.name[:80]} is a link, folder, device or sparse file")
                if name == member.name or name not in names or name in members:
                    raise ValueError(f"member {member.name[:80]}; expected {', '.join(names)}, once each")
                end = member.offset_data + _padded(member.size)
                members[name] = member.offset_data, data[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(f"no tar ({error})") from None
    if members.keys() != set(names):
        raise ValueError(f"members {', '.join(members)}; expected {', '.join(names)}")
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes behind the last member")
    return members


def _padded(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK
