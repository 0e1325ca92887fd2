"""Arrays in .npy and .npz files and tensors in safetensors files from anyone, and posed pictures in .npz files.

Before memory is allocated, the header is checked against the size of the file and the free memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from sitdist.errors import DataError, SitdistError
from sitdist.geometry.camera import Intrinsics, check_intrinsics
from sitdist.geometry.pose import check_rigid
from sitdist.io.atomic import write_atomically
from sitdist.io.files import open_file, read_hashed, require_memory

REMEDY = "save it again with numpy"


@dataclass(frozen=True)
class PosedArray:
    """Pictures [N, H, W, 3], uint8 or floats in [0, 1], their poses [N, 4, 4] float64, and the camera of all."""

    images: np.ndarray
    camera_to_world: Tensor
    intrinsics: Intrinsics


def npz_files(paths: Iterable[Path], remedy: str) -> list[Path]:
    """The files named, and the .npz files in the folders named; DataError, which ends with `remedy`, for none."""
    files: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(path.glob("*.npz"))
            if not found:
                raise DataError(f"{path}: folder without .npz files; put posed pictures there or name the files")
            files += found
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; {remedy}")
    twice = next((file for place, file in enumerate(files) if file in files[:place]), None)
    if twice is not None:
        raise DataError(f"{twice}: given twice; its views would be in the dataset twice, so name it once")
    return files


def read_posed_array(file: Path) -> PosedArray:
    """The arrays images, poses and focal (in pixels) of an .npz file; DataError, PoseError."""
    images, poses, focals = read_arrays(file, ("images", "poses", "focal"))
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise DataError(f"{file}: images of shape {images.shape}; expected [N, H, W, 3] with N > 0")
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise DataError(f"{file}: images of type {images.dtype}; expected uint8, or float in [0, 1]")
    if poses.shape != (len(images), 4, 4):
        raise DataError(f"{file}: {len(images)} images, poses of shape {poses.shape}; expected [{len(images)}, 4, 4]")
    if {poses.dtype.kind, focals.dtype.kind} - set("iuf"):
        raise DataError(f"{file}: poses of type {poses.dtype} and focal of type {focals.dtype}; expected real numbers")
    focal = np.unique(focals.astype(np.float64))
    if len(focal) != 1:
        raise DataError(f"{file}: focal {focals.ravel()[:3].tolist()}; expected one positive number of pixels")
    height, width = images.shape[1:3]
    camera = Intrinsics(float(focal[0]), float(focal[0]), 0.5 * width, 0.5 * height, width, height)
    check_intrinsics(camera, str(file))
    camera_to_world = torch.from_numpy(poses.astype(np.float64))
    for index, pose in enumerate(camera_to_world):
        check_rigid(pose, f"{file}: view {index}")
    if images.dtype.kind == "f":
        for index, image in enumerate(images):  # now, before anything is written
            check_unit_range(image, f"{file}: image {index}")
    return PosedArray(images, camera_to_world, camera)


def check_unit_range(image: np.ndarray, name: str) -> None:
    """DataError, naming the float picture, unless its pixels are in [0, 1] but for rounding."""
    low, high = float(image.min()), float(image.max())  # NaN where a pixel is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{name}: pixels hold NaN or infinity; repair or remove the picture")
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise DataError(f"{name}: pixels from {low:.4g} to {high:.4g}; float pictures are in [0, 1] (divide by 255?)")


def read_arrays(file: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of these names in an .npz file; for one name, also the array in a .npy file. DataError."""
    with open_file(file, REMEDY) as opened:
        try:
            if len(names) == 1 and opened.read(6) == b"\x93NUMPY":
                return [_read_array(opened, os.fstat(opened.fileno()).st_size, str(file), REMEDY)]
            with zipfile.ZipFile(opened) as archive:
                members = [info.filename.removesuffix(".npy") for info in archive.infolist()]
                for name in names:
                    if members.count(name) != 1:
                        count = "several arrays" if name in members else "no array"
                        there = ", ".join(members)[:200]
                        raise DataError(f"{file}: {count} '{name}' (it has {there}); save one of that name")
                infos = [archive.infolist()[members.index(name)] for name in names]
                return [_read_member(archive, info, file, REMEDY) for info in infos]
        except SitdistError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise anything at malicious bytes
            raise DataError(f"{file}: not a readable array ({' '.join(str(error).split())[:160]}); {REMEDY}") from None


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as an uncompressed .npz file, atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def load_arrays(file: Path, remedy: str) -> dict[str, np.ndarray]:
    """All arrays of a file that `save_arrays` wrote; DataError, which ends with `remedy`, for any other file.

    Nothing in it is compressed and no byte is used twice, so the arrays are together no larger than the file.
    """
    with open_file(file, remedy) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                infos = archive.infolist()
                stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
                if not stored or sum(info.file_size for info in infos) > os.fstat(opened.fileno()).st_size:
                    raise ValueError("compressed, or members that overlap")
                arrays = {
                    info.filename.removesuffix(".npy"): _read_member(archive, info, file, remedy) for info in infos
                }
                if len(arrays) < len(infos):
                    raise ValueError("several arrays of one name")
                return arrays
        except (OSError, SitdistError):
            raise
        except Exception as error:  # zipfile and numpy raise anything at malicious bytes
            raise DataError(f"{file}: damaged ({' '.join(str(error).split())[:160]}); {remedy}") from None


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path, remedy: str) -> np.ndarray:
    with archive.open(info) as member:
        array = _read_array(member, info.file_size, f"{file}: {info.filename.removesuffix('.npy')}", remedy)
        if member.read(1):  # reading to the end also checks the member's CRC
            raise ValueError(f"bytes behind the array {info.filename}")
        return array


def _read_array(stream: IO[Any], size: int, name: str, remedy: str) -> np.ndarray:
    """The array in `size` bytes of the .npy format."""
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.hasobject:
        raise DataError(f"{name}: an object array, as of pictures of several sizes; {remedy}")
    need = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or need > size or (shape and not dtype.itemsize):
        raise DataError(f"{name}: shape {list(shape)} of {dtype} needs {need:,} bytes and {size:,} are there; {remedy}")
    require_memory(need, name, "split the file")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


# -------------------------------------------------------------------------------------------------------------- tensors


FLOAT32 = (torch.float32,)


def read_tensors(
    path: Path,
    sha256: str | None,
    remedy: str,
    error: type[SitdistError] = DataError,
    dtypes: Collection[torch.dtype] = FLOAT32,
) -> dict[str, Tensor]:
    """The tensors in a safetensors file; `error`, which ends with `remedy`, for what `check_numbers` refuses, or if
    the file is missing, damaged, or has another SHA-256.
    """
    data = read_hashed(path, sha256, remedy, error)
    try:
        tensors = load(data)
    except Exception as failure:  # of many types, where the header is not one
        raise error(f"{path}: no safetensors file ({str(failure)[:160] or type(failure).__name__}); {remedy}") from None
    check_numbers(tensors, path, remedy, error, dtypes)
    return tensors


def check_numbers(
    tensors: Mapping[str, Tensor],
    where: Path,
    remedy: str,
    error: type[SitdistError] = DataError,
    dtypes: Collection[torch.dtype] = FLOAT32,
) -> None:
    """`error`, which names the first tensor that is of none of `dtypes`, or that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in list(dtypes)[:4])
            found = str(tensor.dtype).removeprefix("torch.")
            raise error(f"{where}: tensor {name[:80]} is {found}, expected {expected}; {remedy}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise error(f"{where}: tensor {name[:80]} holds NaN or infinity; {remedy}")


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and the bytes of tensors, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
