"""COLMAP's text model: cameras.txt and images.txt as pinhole cameras with OpenGL camera-to-world poses.

COLMAP gives world-to-camera quaternions (w, x, y, z) and translations for axes x right, y down, z forward; pixel
centres are at half integers, as here. Source: COLMAP's documentation, "Output format".
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics, check_intrinsics
from sitdist.geometry.pose import check_rigid
from sitdist.io.files import open_file

# parameters of every model that is a pinhole camera where its distortion is 0; SIMPLE_... have one focal length, f
PINHOLE = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "FULL_OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
}
MAX_LINE = 2**26  # bytes; a picture of a million points has 30 MB of them
FOLDERS = (".", "sparse/0", "sparse", "0")  # where a model lies in a workspace


@dataclass(frozen=True)
class ColmapImage:
    """One posed picture: its file's name below the picture folder, camera_to_world [4, 4] float64, intrinsics."""

    name: str
    camera_to_world: Tensor
    intrinsics: Intrinsics


def find_model(folder: Path) -> Path | None:
    """The folder of a workspace that holds cameras.txt and images.txt; DataError if its model is binary."""
    for place in FOLDERS:
        if all(os.path.isfile(folder / place / name) for name in ("cameras.txt", "images.txt")):
            return folder / place
    for place in FOLDERS:
        if os.path.isfile(folder / place / "cameras.bin"):
            raise DataError(
                f"{folder / place / 'cameras.bin'}: COLMAP's binary model; write it as text with "
                "`colmap model_converter --output_type TXT`"
            )
    return None


def read_model(folder: Path) -> list[ColmapImage]:
    """The registered pictures of a model, in order of their names; DataError, PoseError for what cannot be used."""
    cameras = read_cameras(folder / "cameras.txt")
    images = read_images(folder / "images.txt", cameras)
    if not images:
        raise DataError(f"{folder / 'images.txt'}: holds no pictures; reconstruct the photos' poses first")
    return sorted(images, key=lambda image: image.name)


def read_cameras(path: Path) -> dict[str, Intrinsics]:
    """Pinhole cameras by their number (as text); DataError for distortion, which no pinhole camera has."""
    cameras: dict[str, Intrinsics] = {}
    for number, line in _lines(path):
        words = line.split()
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) < 4:
            raise DataError(f"{where}: '{line[:60]}' is no camera; expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS")
        if words[0] in cameras:
            raise DataError(f"{where}: camera {words[0][:60]} is there twice; remove one")
        cameras[words[0]] = _pinhole(words[1], _numbers(words[2:4], where), _numbers(words[4:], where), where)
    return cameras


def _pinhole(model: str, size: list[float], values: list[float], where: str) -> Intrinsics:
    names = PINHOLE.get(model)
    if names is None:
        raise DataError(f"{where}: camera model {model[:60]} is no pinhole camera; run `colmap image_undistorter`")
    if len(values) != len(names):
        raise DataError(f"{where}: {len(values)} parameters, but {model} has {len(names)} ({', '.join(names)})")
    given = dict(zip(names, values, strict=True))
    for name, value in given.items():
        if name[0] in "kp" and value != 0.0:
            raise DataError(
                f"{where}: {model} with distortion {name} = {value:g}, which a pinhole camera has not; run "
                "`colmap image_undistorter` first"
            )
    fx, fy = given.get("fx", given.get("f", 0.0)), given.get("fy", given.get("f", 0.0))
    width, height = (int(side) if side.is_integer() else side for side in size)
    camera = Intrinsics(fx, fy, given["cx"], given["cy"], width, height)  # type: ignore[arg-type]
    check_intrinsics(camera, where)
    return camera


def read_images(path: Path, cameras: dict[str, Intrinsics]) -> list[ColmapImage]:
    """The pictures of images.txt, two lines for each: pose, camera and name; then its points, which may be none."""
    images: list[ColmapImage] = []
    lines, numbers, names = _lines(path), set(), set()
    for number, line in lines:
        words = line.split(maxsplit=9)
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) != 10:
            raise DataError(f"{where}: '{line[:60]}' is no picture; write IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME")
        if words[8] not in cameras:
            raise DataError(f"{where}: camera {words[8][:60]} of {words[9][:200]} is not in cameras.txt; restore it")
        name = words[9].strip()
        if words[0] in numbers or name in names:
            raise DataError(f"{where}: picture {words[0][:60]}, {name[:200]}, is there twice; remove one")
        if os.path.isabs(name) or ".." in PurePosixPath(name).parts:
            raise DataError(
                f"{where}: picture {name[:200]} is not in the folder of pictures; name it by its path below"
            )
        numbers.add(words[0])
        names.add(name)
        pose = camera_to_world(_numbers(words[1:5], where), _numbers(words[5:8], where), where)
        images.append(ColmapImage(name, pose, cameras[words[8]]))
        next(lines, None)  # its points
    return images


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
    with open_file(path, "a COLMAP text model has cameras.txt and images.txt") as file:
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
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise DataError(f"{where}: {' '.join(words)[:60]} are not all finite numbers; repair the line")
    return values
