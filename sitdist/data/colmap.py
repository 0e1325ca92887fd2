"""COLMAP's text model: cameras.txt and images.txt as pinhole cameras with OpenGL camera-to-world poses.

COLMAP gives world-to-camera quaternions (w, x, y, z) and translations for axes x right, y down, z forward; pixel
centres are at half integers, as here. Source: COLMAP's documentation, "Output format".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import check_rigid

# parameters of every model that is a pinhole camera where its distortion is 0; SIMPLE_... have one focal length, f
PINHOLE = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "FULL_OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
}
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
        if all((folder / place / name).is_file() for name in ("cameras.txt", "images.txt")):
            return folder / place
    for place in FOLDERS:
        if (folder / place / "cameras.bin").is_file():
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
    cameras = {}
    for number, line in _lines(path):
        words = line.split()
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) < 4:
            raise DataError(f"{where}: '{line[:60]}' is no camera; expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS")
        size = _numbers(words[2:4], where)
        width, height = int(size[0]), int(size[1])
        cameras[words[0]] = _pinhole(words[1], width, height, _numbers(words[4:], where), where)
    return cameras


def _pinhole(model: str, width: int, height: int, values: list[float], where: str) -> Intrinsics:
    names = PINHOLE.get(model)
    if names is None:
        raise DataError(f"{where}: camera model {model} is no pinhole camera; run `colmap image_undistorter` first")
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
    if fx <= 0 or fy <= 0 or width <= 0 or height <= 0:
        raise DataError(f"{where}: focal lengths {fx:g}, {fy:g} for {width}x{height} pixels; expected positive numbers")
    return Intrinsics(fx, fy, given["cx"], given["cy"], width, height)


def read_images(path: Path, cameras: dict[str, Intrinsics]) -> list[ColmapImage]:
    """The pictures of images.txt, two lines for each: pose, camera and name; then its points, which may be none."""
    images = []
    lines = _lines(path)
    for number, line in lines:
        words = line.split(maxsplit=9)
        if not words:
            continue
        where = f"{path}: line {number}"
        if len(words) != 10:
            raise DataError(
                f"{where}: '{line[:60]}' is no picture; expected IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
            )
        if words[8] not in cameras:
            raise DataError(f"{where}: camera {words[8]} of {words[9]} is not in cameras.txt; restore it")
        pose = camera_to_world(_numbers(words[1:5], where), _numbers(words[5:8], where), where)
        images.append(ColmapImage(words[9].strip(), pose, cameras[words[8]]))
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
    if not path.is_file():
        raise DataError(f"{path}: no such file; a COLMAP text model has cameras.txt and images.txt")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error.reason}); write the model as text") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.startswith("#"):
            yield number, line.rstrip("\r")


def _numbers(words: list[str], where: str) -> list[float]:
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise DataError(f"{where}: {' '.join(words)[:60]} are not all finite numbers; repair the line")
    return values
