"""The transforms.json of Blender, instant-ngp and nerfstudio: frames with poses, pinhole cameras and picture files.

Source: nerfstudio's documentation of its data format. Poses are OpenGL camera-to-world; sizes, poses and intrinsics
are those of the upright picture.
"""

from __future__ import annotations

import math
import os
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.errors import DataError, shortened, shown
from sitdist.geometry.camera import Intrinsics, check_intrinsics
from sitdist.geometry.distortion import Distortion
from sitdist.geometry.pose import check_rigid
from sitdist.io.files import read_json
from sitdist.io.images import check_camera_size, focal_length, picture_sizes

PERSPECTIVE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "RADIAL", "SIMPLE_RADIAL", "PERSPECTIVE")
FISHEYE_MODEL = "OPENCV_FISHEYE"
REMEDY = "repair it or write it again"


@dataclass(frozen=True)
class PosedFile:
    """A picture file, where its camera stood, camera_to_world [4, 4] float64, and the camera, which tells its size.

    `distortion`: what the lens does to a pinhole camera's picture, if it does anything.
    """

    picture: Path
    camera_to_world: Tensor
    intrinsics: Intrinsics
    distortion: Distortion | None = None


def transforms_file(path: Path) -> Path:
    """`path`, or the transforms.json in the folder `path`; DataError where there is none."""
    file = path / "transforms.json" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise DataError(f"{file}: no such file; give the path of a transforms.json or its folder")
    return file


class MissingPicture(DataError):
    """A list of pictures names one that has no file."""


def read_posed_files(file: Path, missing: list[str] | None = None) -> list[PosedFile]:
    """The frames of a transforms.json with their pictures, of which only headers are read; DataError, PoseError.

    Without a focal length in the file, the one in the picture's EXIF data counts. `missing`: pictures without a file
    are added to this list and left out; without a list they are an error.
    """
    posed = []
    for where, values in frames_of(read_json(file, REMEDY), file):
        name = values.get("file_path")
        if not isinstance(name, str):
            raise DataError(f"{where}: file_path is {shown(name)}; expected the path of a picture")
        pose = pose_of(values.get("transform_matrix"), where)
        try:
            picture = find_picture(file.parent, name, where)
        except MissingPicture:
            if missing is None:
                raise
            missing.append(name)
            continue
        posed.append(PosedFile(picture, pose, _pinhole(values, picture, where), distortion_of(values, where)))
    check_distinct((each.picture for each in posed), file)
    return posed


def frames_of(values: Mapping[str, Any], file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every frame of a transforms.json: its name in messages, and its values, which come before the file's own."""
    frames = values.get("frames")
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise DataError(f"{file}: no list of frames with file_path and transform_matrix; {REMEDY}")
    if not frames:
        raise DataError(f"{file}: holds no frames")
    return [
        (f"{file}: frame {str(frame.get('file_path', number))[:200]}", ChainMap(frame, values))  # type: ignore[arg-type]
        for number, frame in enumerate(frames)
    ]


def pose_of(matrix: Any, where: str) -> Tensor:
    """A rigid pose [4, 4] float64 of four rows of four numbers, or of 16 numbers row by row; DataError, PoseError."""
    try:
        array = np.array(matrix)
    except (ValueError, OverflowError):  # ragged
        array = np.array(None)
    if array.dtype.kind not in "iuf":  # numbers in quotes are text
        raise DataError(f"{where}: its pose is not a 4x4 matrix of numbers; give one, or remove the frame")
    pose = torch.from_numpy(array.astype(np.float64))
    pose = pose.reshape(4, 4) if pose.shape == (16,) else pose
    check_rigid(pose, where)
    return pose


def camera_of(values: Mapping[str, Any], width: int, height: int, where: str) -> Intrinsics:
    """A frame's camera for pictures of width x height pixels: fl_x and the like, or camera_angle_x; DataError."""
    if "fl_x" in values:
        fx = number_of(values, "fl_x", where)
        fy = number_of(values, "fl_y", where, fx)
        cx, cy = number_of(values, "cx", where, 0.5 * width), number_of(values, "cy", where, 0.5 * height)
        camera = Intrinsics(fx, fy, cx, cy, width, height)
    else:
        angle = number_of(values, "camera_angle_x", where, 0.0)
        if not 0.0 < angle < math.pi:
            raise DataError(
                f"{where}: no fl_x, and camera_angle_x is {values.get('camera_angle_x')}; give the focal length in "
                "pixels, or the angle of view in radians"
            )
        camera = Intrinsics.from_fov(math.degrees(angle), width, height)
    check_intrinsics(camera, where)
    return camera


def distortion_of(values: Mapping[str, Any], where: str) -> Distortion | None:
    """The distortion of a frame's lens; None for a pinhole camera; DataError."""
    model = values.get("camera_model", "PINHOLE")
    k1, k2, k3, k4, p1, p2 = (number_of(values, key, where, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if model == FISHEYE_MODEL:
        return Distortion("fisheye", (k1, k2, k3, k4))
    if model not in PERSPECTIVE_MODELS:
        raise DataError(
            f"{where}: camera_model {str(model)[:40]} is neither {FISHEYE_MODEL} nor one of "
            f"{', '.join(PERSPECTIVE_MODELS)}; undistort the pictures first"
        )
    if k4 != 0.0:  # nerfstudio takes it for the factor of r^8, OpenCV for one of a denominator
        raise DataError(f"{where}: k4 is {k4:g}, which only {FISHEYE_MODEL} has; undistort the pictures first")
    return Distortion("perspective", (k1, k2, k3), (p1, p2)) if any((k1, k2, k3, p1, p2)) else None


def size_of(values: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Width and height where the values tell both; DataError unless they are whole numbers above 0."""
    if "w" not in values or "h" not in values:
        return None
    width, height = number_of(values, "w", where), number_of(values, "h", where)
    if min(width, height) < 1 or width % 1 or height % 1:
        raise DataError(f"{where}: w and h are {width:g} and {height:g}; expected pixels, above 0")
    return int(width), int(height)


def number_of(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A number, as a float; DataError for what is none, or beyond 1e18."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise DataError(f"{where}: {key} is {str(value)[:40]!r}; expected a number")
    return float(value)


def find_picture(folder: Path, name: str, where: str) -> Path:
    """The file that a list of pictures calls `name`, perhaps without its .png, below `folder` or a folder above it."""
    path = folder / name
    if os.path.isabs(name):
        raise DataError(f"{where}: picture {name[:200]} is an absolute path; name it by its path from {folder}")
    for candidate in (path, Path(f"{path}.png")):
        if os.path.isfile(candidate):
            return candidate
    raise MissingPicture(
        f"{where}: picture is missing (looked for {shortened(str(path))}); restore it or remove its entry"
    )


def check_distinct(pictures: Iterable[Path], where: Path) -> None:
    """DataError if a picture is in the list twice, which has two poses then."""
    seen = set()
    for picture in pictures:
        path = os.path.normpath(picture)
        if path in seen:
            raise DataError(f"{where}: picture {picture} is there twice; remove one of its poses")
        seen.add(path)


def _pinhole(values: Mapping[str, Any], picture: Path, where: str) -> Intrinsics:
    """A frame's camera, without its lens, for its picture; DataError for another size."""
    shown, stored = picture_sizes(picture)
    told = None  # a size, where the file tells one; what it leaves out is the picture's
    if "w" in values or "h" in values:
        told = size_of(ChainMap(values, {"w": shown[0], "h": shown[1]}), where)  # type: ignore[arg-type]
    untold = "fl_x" not in values and "camera_angle_x" not in values
    if untold and (focal := focal_length(picture)) is not None:
        values, told = ChainMap({"fl_x": focal}, values), told or shown  # type: ignore[arg-type]
    check_camera_size(shown, stored, told, str(picture))
    return camera_of(values, *shown, where)


def transforms(
    camera_to_world: Tensor, intrinsics: Sequence[Intrinsics], names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Cameras [N, 4, 4] with N intrinsics as a transforms.json of pictures `names`, by default 00000.png and on."""
    names = names or [f"{number:05d}.png" for number in range(len(intrinsics))]
    frames = [
        {
            "file_path": name,
            "transform_matrix": pose.tolist(),
            "fl_x": camera.fx,
            "fl_y": camera.fy,
            "cx": camera.cx,
            "cy": camera.cy,
            "w": camera.width,
            "h": camera.height,
        }
        for name, pose, camera in zip(names, camera_to_world, intrinsics, strict=True)
    ]
    return {"camera_model": "PINHOLE", "frames": frames}
