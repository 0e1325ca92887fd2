"""What a dataset on disk looks like; shards/README.md is the same in prose.

    manifest.json   provenance.json   codec/   SPLIT/00000.tar   SPLIT/00000.index.npz   ...

Sample i of a split has the key f"{i:09d}". Its members lie side by side in the tar, and the index says where.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sitdist.errors import DataError
from sitdist.io.json_file import parse_json

if TYPE_CHECKING:
    from sitdist.geometry.camera import Intrinsics

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
ROW_BYTES = sum(
    np.dtype(dtype).itemsize * (16 if name == "camera_to_world" else 1) for name, dtype in INDEX_FIELDS.items()
)
BLOCK = 512  # bytes; a tar's headers are one, and data is padded to whole ones
META_BYTES = 64 * BLOCK  # at most of meta.json, of all tar headers of a sample, and of padding
BUILD_AGAIN = "build the dataset again"
PSNR = (0.0, 100.0)  # dB, of pictures in [0, 1]; the mean square error is taken as at least 1e-10
RADIUS_TOLERANCE = 1e-6  # relative
Size = Annotated[int, Field(ge=1, le=2**50)]
Label = Annotated[int, Field(ge=0, lt=10**6)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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
        from sitdist.geometry.camera import Intrinsics  # torch is slow to import, and a manifest needs none of it

        return Intrinsics(self.fx, self.fy, self.cx, self.cy, self.width, self.height)


def index_name(tar: str) -> str:
    """The name of a tar's index."""
    return tar.removesuffix(".tar") + ".index.npz"


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
    from sitdist.geometry.camera import check_intrinsics

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


def _keys(indices: Iterable[int]) -> list[str]:
    return [f"{index:09d}" for index in indices]


def _first(error: ValidationError) -> str:
    """The first thing that is wrong: key, value and what is expected."""
    first = error.errors(include_url=False)[0]
    key, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if first["type"] == "string_pattern_mismatch":
        reason = "not a name or a hash as sitdist writes them"
    if first["type"] in ("value_error", "missing"):
        return f"{key}: {reason}"[:300] if key else reason[:300]
    return f"{key} = {first['input']!r:.60}: {reason[:1].lower()}{reason[1:]}"[:300]
