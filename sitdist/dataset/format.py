"""The format of a dataset on disk: the members of a sample and the columns of an index.

    manifest.json   provenance.json   codec/   SPLIT/00000.tar   SPLIT/00000.index.npz   ...

Sample i of a split has the key f"{i:09d}". Its members lie side by side in the tar, and the index says where.
shards/README.md describes the same in prose.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sitdist.errors import DataError
from sitdist.io.files import parse_json

if TYPE_CHECKING:
    from sitdist.geometry.camera import Intrinsics

MEMBERS = ("camera_to_world.npy", "meta.json", "moments.npy", "packed_pose.npy")
IMAGE_MEMBER = "image.png"  # in every split but train
VIEW_MEMBER = "view.npy"  # where the recipe says keep_views
INDEX_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {  # type and shape of each sample's entry
    "start": ("<i8", ()),  # first byte of the sample's first tar header
    "stop": ("<i8", ()),  # one past the last padding byte of its last member
    "crc32": ("<u4", ()),  # of all bytes between
    "moments": ("<i8", ()),  # first byte of the .npy file
    "packed_pose": ("<i8", ()),
    "image": ("<i8", ()),  # 0 where there is none
    "image_bytes": ("<i8", ()),
    "label": ("<i8", ()),
    "camera_to_world": ("<f8", (4, 4)),
    "codec_psnr": ("<f8", ()),  # NaN where no image is kept
    "intrinsics": ("<f8", (4,)),  # fx / width, fy / height, cx / width, cy / height
    "view": ("<i8", ()),
}
OPTIONAL_FIELDS = {"intrinsics", "view"}  # missing in shards that older versions built, or that keep no views
BLOCK = 512  # bytes of a tar header; members are padded to a multiple of it
META_BYTES = 64 * BLOCK  # upper bound for meta.json, the tar headers and the padding of one sample
PSNR = (0.0, 100.0)  # dB, of pictures in [0, 1]; the mean squared error is clamped to 1e-10
RADIUS_TOLERANCE = 1e-6  # relative
BUILD_AGAIN = "build the dataset again"
Size = Annotated[int, Field(ge=1, le=2**50)]
Label = Annotated[int, Field(ge=0, lt=10**6)]


class StrictModel(BaseModel):
    """No unknown keys, no conversions, finite numbers only."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def sample_key(index: int) -> str:
    """The key of a sample of a split."""
    return f"{index:09d}"


class SampleMeta(StrictModel):
    """meta.json of a sample: the camera in pixels, the label of the object, and the camera's distance to the origin."""

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
        from sitdist.geometry.camera import Intrinsics  # torch is slow to import, and a manifest needs none of it

        return Intrinsics(self.fx, self.fy, self.cx, self.cy, self.width, self.height)


def index_name(tar: str) -> str:
    """The name of a tar's index."""
    return tar.removesuffix(".tar") + ".index.npz"


def npy_header(dtype: Any, shape: tuple[int, ...]) -> bytes:
    """The header of an .npy file of version 1.0."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def npy_size(dtype: Any, shape: tuple[int, ...]) -> int:
    """The size of such a file in bytes."""
    return len(npy_header(dtype, shape)) + math.prod(shape) * np.dtype(dtype).itemsize


def parse_npy(data: bytes, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array in such a file; ValueError if it has another type or shape."""
    header = npy_header(dtype, shape)
    if not data.startswith(header) or len(data) != npy_size(dtype, shape):
        raise ValueError(f"no {np.dtype(dtype)} array of {list(shape)} in .npy version 1.0")
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape).copy()


def parse_meta(data: bytes, image_size: int, where: str) -> SampleMeta:
    """Parse meta.json of a sample, called `where` in errors; DataError if it is damaged or the picture size differs."""
    try:
        meta = SampleMeta.model_validate(parse_json(data, where, BUILD_AGAIN))
    except ValidationError as error:
        raise DataError(f"{where}: damaged ({first_problem(error)}); {BUILD_AGAIN}") from None
    if not meta.width == meta.height == image_size:
        raise DataError(f"{where}: {meta.width}x{meta.height} pixels but pictures have {image_size}; {BUILD_AGAIN}")
    from sitdist.geometry.camera import check_intrinsics

    check_intrinsics(meta.camera, where)
    return meta


def sample_members(data: bytes, key: str, names: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    """The offset and the bytes of each member of one sample, by name; `data` is the sample's part of the tar.

    ValueError unless the members are plain files named KEY.NAME, each of `names` once, and fill `data`.
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
                end = member.offset_data + padded_size(member.size)
                members[name] = member.offset_data, data[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(f"no tar ({error})") from None
    if members.keys() != set(names):
        raise ValueError(f"members {', '.join(members)}; expected {', '.join(names)}")
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes behind the last member")
    return members


def padded_size(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation: key, value and what is expected."""
    first = error.errors(include_url=False)[0]
    key, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        reason = "not a name or a hash as sitdist writes them"
    if first["type"] in ("value_error", "missing"):
        return f"{key}: {reason}"[:300] if key else reason[:300]
    return f"{key} = {first['input']!r:.60}: {reason[:1].lower()}{reason[1:]}"[:300]
