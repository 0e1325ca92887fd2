"""COLMAP's text and binary models: cameras with their lens distortion, and OpenGL camera-to-world poses.

COLMAP gives world-to-camera quaternions (w, x, y, z) and translations for axes x right, y down, z forward; pixel
centres are at half integers, as here. Source: COLMAP's documentation, "Output format".
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics, check_intrinsics
from sitdist.geometry.distortion import Distortion
from sitdist.geometry.pose import check_rigid
from sitdist.io.files import open_file

# parameters of every model, in order of its number in cameras.bin; with one focal length, f, or two
MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "OPENCV_FISHEYE": ("fx", "fy", "cx", "cy", "k1", "k2", "k3", "k4"),
    "FULL_OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
    "FOV": ("fx", "fy", "cx", "cy", "omega"),
    "SIMPLE_RADIAL_FISHEYE": ("f", "cx", "cy", "k"),
    "RADIAL_FISHEYE": ("f", "cx", "cy", "k1", "k2"),
}
Camera = tuple[Intrinsics, Distortion | None]
REMEDY = "write the model again"
MAX_NAME = 4096  # bytes
MAX_LINE = 2**26  # bytes; a picture of a million points has 30 MB of them
FOLDERS = (".", "sparse/0", "sparse", "0")  # where a model lies in a workspace


@dataclass(frozen=True)
class ColmapImage:
    """One posed picture: its file's name below the picture folder, camera_to_world [4, 4] float64, intrinsics of the
    camera without its lens, and the lens's distortion; None for a pinhole camera.
    """

    name: str
    camera_to_world: Tensor
    intrinsics: Intrinsics
    distortion: Distortion | None


def find_model(folder: Path) -> Path | None:
    """The folder of a workspace that holds cameras and images, both .txt or, in no folder of it, both .bin."""
    for suffix in (".txt", ".bin"):
        for place in FOLDERS:
            if all(os.path.isfile(folder / place / f"{name}{suffix}") for name in ("cameras", "images")):
                return folder / place
    return None


def model_files(folder: Path) -> tuple[Path, Path]:
    """The cameras and the images of a model; the text, where it is there as text and binary."""
    suffix = ".txt" if os.path.isfile(folder / "cameras.txt") else ".bin"
    return folder / f"cameras{suffix}", folder / f"images{suffix}"


def read_model(folder: Path) -> list[ColmapImage]:
    """The registered pictures of a model, in order of their names; DataError, PoseError for what cannot be used."""
    cameras, images = model_files(folder)
    views = read_images(images, read_cameras(cameras))
    if not views:
        raise DataError(f"{images}: holds no pictures; reconstruct the photos' poses first")
    return sorted(views, key=lambda view: view.name)


def read_cameras(path: Path) -> dict[str, Camera]:
    """Cameras of cameras.txt or cameras.bin by their number (as text); DataError."""
    cameras: dict[str, Camera] = {}
    for where, number, model, size, values in _binary_cameras(path) if path.suffix == ".bin" else _text_cameras(path):
        if number in cameras:
            raise DataError(f"{where}: camera {number[:60]} is there twice; remove one")
        cameras[number] = _camera(model, size, values, where)
    return cameras


def _text_cameras(path: Path) -> Iterator[tuple[str, str, str, list[float], list[float]]]:
    for number, line in _lines(path):
        words = line.split()
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) < 4:
            raise DataError(f"{where}: '{line[:60]}' is no camera; expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS")
        yield where, words[0], words[1], _numbers(words[2:4], where), _numbers(words[4:], where)


def _binary_cameras(path: Path) -> Iterator[tuple[str, str, str, list[float], list[float]]]:
    models = list(MODELS)
    with open_file(path, REMEDY) as file:
        for index in range(_unpacked(file, "<Q", path)[0]):
            where = f"{path}: camera {index}"
            number, model, width, height = _unpacked(file, "<IiQQ", path)
            if not 0 <= model < len(models):
                raise _unknown(f"number {model}", where)
            values = _unpacked(file, f"<{len(MODELS[models[model]])}d", path)
            yield where, str(number), models[model], [float(width), float(height)], _finite(values, where)


def _unknown(model: str, where: str) -> DataError:
    return DataError(f"{where}: camera model {model} is none of {', '.join(MODELS)}; run `colmap image_undistorter`")


def _camera(model: str, size: list[float], values: list[float], where: str) -> Camera:
    """A camera of COLMAP's, https://github.com/colmap/colmap/blob/main/src/colmap/sensor/models.h; DataError."""
    names = MODELS.get(model)
    if names is None:
        raise _unknown(model[:60], where)
    if len(values) != len(names):
        raise DataError(f"{where}: {len(values)} parameters, but {model} has {len(names)} ({', '.join(names)})")
    given = dict(zip(names, values, strict=True))
    fx, fy = given.get("fx", given.get("f", 0.0)), given.get("fy", given.get("f", 0.0))
    width, height = (int(side) if side.is_integer() else side for side in size)
    camera = Intrinsics(fx, fy, given["cx"], given["cy"], width, height)  # type: ignore[arg-type]
    check_intrinsics(camera, where)
    if model == "FOV":
        return camera, Distortion("fov", (given["omega"],))
    radial = tuple(given.get(f"k{order}", given.get("k", 0.0) if order == 1 else 0.0) for order in range(1, 7))
    if "FISHEYE" in model:
        return camera, Distortion("fisheye", radial[:4])
    tangential = given.get("p1", 0.0), given.get("p2", 0.0)
    return camera, Distortion("perspective", radial, tangential) if any(radial + tangential) else None


def read_images(path: Path, cameras: dict[str, Camera]) -> list[ColmapImage]:
    """The pictures of images.txt or images.bin; DataError, PoseError."""
    images: list[ColmapImage] = []
    numbers, names = set(), set()
    for where, number, pose, camera, name in _binary_images(path) if path.suffix == ".bin" else _text_images(path):
        if camera not in cameras:
            raise DataError(f"{where}: camera {camera[:60]} of {name[:200]} is not in cameras{path.suffix}; restore it")
        if number in numbers or name in names:
            raise DataError(f"{where}: picture {number[:60]}, {name[:200]}, is there twice; remove one")
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
            raise DataError(
                f"{where}: picture {name[:200]} is not in the folder of pictures; name it by its path below"
            )
        numbers.add(number)
        names.add(name)
        images.append(ColmapImage(name, camera_to_world(pose[:4], pose[4:], where), *cameras[camera]))
    return images


def _text_images(path: Path) -> Iterator[tuple[str, str, list[float], str, str]]:
    """Two lines for each picture: pose, camera and name; then its points, which may be none."""
    lines = _lines(path)
    for number, line in lines:
        words = line.split(maxsplit=9)
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) != 10:
            raise DataError(f"{where}: '{line[:60]}' is no picture; write IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        yield where, words[0], _numbers(words[1:8], where), words[8], words[9].strip()
        next(lines, None)  # its points


def _binary_images(path: Path) -> Iterator[tuple[str, str, list[float], str, str]]:
    with open_file(path, REMEDY) as file:
        for index in range(_unpacked(file, "<Q", path)[0]):
            where = f"{path}: picture {index}"
            number, *pose, camera = _unpacked(file, "<I7dI", path)
            name = bytearray()
            while (byte := file.read(1)) != b"\0":
                if not byte or len(name) == MAX_NAME:
                    raise DataError(f"{where}: its name does not end; {REMEDY}")
                name += byte
            try:
                text = name.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: its name is not text ({error.reason}); {REMEDY}") from None
            file.seek(24 * min(_unpacked(file, "<Q", path)[0], 2**56), os.SEEK_CUR)  # its points
            yield where, str(number), _finite(pose, where), str(camera), text
        if file.tell() > os.fstat(file.fileno()).st_size:
            raise DataError(f"{path}: ends too early; {REMEDY}")


def _unpacked(file: BinaryIO, layout: str, path: Path) -> tuple[Any, ...]:
    data = file.read(struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise DataError(f"{path}: ends too early; {REMEDY}")
    return struct.unpack(layout, data)


def camera_to_world(quaternion: list[float], translation: list[float], where: str) -> Tensor:
    """OpenGL camera_to_world [4, 4] float64 of COLMAP's world-to-camera (w, x, y, z) and translation; PoseError."""
    q = torch.tensor(quaternion, dtype=torch.float64)
    norm = float(torch.linalg.vector_norm(q))
    if abs(norm - 1.0) > 1e-3:
        raise DataError(f"{where}: quaternion {quaternion} of length {norm:.4g}; expected a rotation, of length 1")
    w, x, y, z = (q / norm).tolist()
    world_to_camera = torch.tensor(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ],
        dtype=torch.float64,
    )
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = world_to_camera.T * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)  # y up, z backward
    pose[:3, 3] = -world_to_camera.T @ torch.tensor(translation, dtype=torch.float64)
    check_rigid(pose, where)
    return pose


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends, but for comments; DataError if there is no such text file."""
    number = 0
    with open_file(path, REMEDY) as file:
        while line := file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise DataError(f"{path}: line {number} has {MAX_LINE:,} bytes or more; write the model as text")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {number} is not text ({error.reason}); write it as text") from None
            if not text.startswith("#"):
                yield number, text.rstrip("\r\n")


def _numbers(words: list[str], where: str) -> list[float]:
    try:
        return _finite([float(word) for word in words], where)
    except ValueError:
        raise DataError(f"{where}: {' '.join(words)[:60]} are not all finite numbers; repair the line") from None


def _finite(values: Sequence[float], where: str) -> list[float]:
    if not all(map(math.isfinite, values)):
        raise DataError(f"{where}: {str(list(values))[:60]} are not all finite numbers; {REMEDY}")
    return list(values)
