"""Estimated poses as files that other tools read: JSON lines, CSV, transforms.json, COLMAP's text model, TUM.

The poses are OpenGL camera-to-world, as nerfstudio has them; COLMAP's text model is world-to-camera and TUM's is
camera-to-world, both with OpenCV axes (x right, y down, z forward) and quaternions.
Sources: nerfstudio's documentation of its data format; COLMAP's of its text format; the TUM RGB-D benchmark's of its
trajectories, which evo reads.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.data.camera_path import transforms
from sitdist.data.colmap import find_model, read_model
from sitdist.errors import DataError, one_line
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import check_rigid
from sitdist.io.atomic import write_atomically, write_folder

OPENCV = (1.0, -1.0, -1.0)  # the signs of OpenGL's axes in OpenCV's


@dataclass(frozen=True)
class PosedPicture:
    """A picture file and what was estimated for it.

    camera_to_world [4, 4] float64, OpenGL; intrinsics of the file's pixels, where they are known; facts: numbers that
    tell how good the estimate is, by name.
    """

    path: Path
    camera_to_world: Tensor
    intrinsics: Intrinsics | None
    facts: dict[str, float | bool]


def check_free(out: Path, kind: str, overwrite: bool = False) -> None:
    """DataError if there is something at `out` already that may not be written over, a folder in any case."""
    if out.exists() and (kind == "colmap" or not overwrite or out.is_dir()):
        remedy = "remove it" if kind == "colmap" or out.is_dir() else "write over it by --overwrite"
        raise DataError(f"{out}: already exists; give another --out, or {remedy}")


def write_poses(posed: Sequence[PosedPicture], kind: str, out: Path, overwrite: bool = False) -> None:
    """Write them to the file `out`, or for `colmap` to the new folder `out`; whole or not at all.

    DataError where `out` cannot be written, or is there and not to be written over, or where the format needs
    intrinsics that are not known.
    """
    check_free(out, kind, overwrite)
    if kind == "colmap":
        files = colmap_files(posed)
        write_folder(out, lambda folder: _write_all(folder, files))
        return
    text = to_text(posed, kind, out.parent)
    write_atomically(out, lambda path: path.write_text(text, "utf-8", "backslashreplace"))


def _write_all(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def to_text(posed: Sequence[PosedPicture], kind: str, beside: Path | None = None) -> str:
    """As one of the formats of one file; pictures are named by their path from the folder `beside` (None: as given)."""
    names = [_name(each.path, beside) for each in posed]
    if kind == "jsonl":
        return "".join(json.dumps(_values(each, name)) + "\n" for each, name in zip(posed, names, strict=True))
    if kind == "csv":
        return _csv(posed, names)
    if kind == "tum":
        return tum_text(posed)
    poses = torch.stack([each.camera_to_world for each in posed])
    values = transforms(poses, _cameras(posed, "transforms.json"), names)
    return json.dumps(values, indent=1) + "\n"


def _name(path: Path, beside: Path | None) -> str:
    if beside is None:
        return str(path)
    return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()


def _names_in_one_folder(posed: Sequence[PosedPicture]) -> list[str]:
    """Every picture's path from the folder that holds all of them; its bare name where that is the same for all."""
    paths = [each.path.resolve() for each in posed]
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(folder).as_posix() for path in paths]


def _cameras(posed: Sequence[PosedPicture], what: str) -> list[Intrinsics]:
    for each in posed:
        if each.intrinsics is None:
            raise DataError(f"{each.path}: its intrinsics are not known, and {what} needs them; give --intrinsics")
    return [each.intrinsics for each in posed if each.intrinsics is not None]


def _values(each: PosedPicture, name: str) -> dict[str, Any]:
    """One picture's record, in plain numbers."""
    values: dict[str, Any] = {"file": name, "camera_to_world": each.camera_to_world.tolist()}
    if each.intrinsics is not None:
        camera = each.intrinsics
        numbers = zip(("fx", "fy", "cx", "cy"), camera.to_list(), strict=True)
        values |= dict(numbers) | {"width": camera.width, "height": camera.height}
    return values | each.facts


def _csv(posed: Sequence[PosedPicture], names: Sequence[str]) -> str:
    """One row a picture; the pose as the twelve entries of its first three rows, r00 ... r22 and tx, ty, tz."""
    rows = []
    for each, name in zip(posed, names, strict=True):
        values = _values(each, name)
        matrix = values.pop("camera_to_world")
        entries = {f"r{i}{j}": matrix[i][j] for i in range(3) for j in range(3)}
        entries |= {axis: matrix[i][3] for i, axis in enumerate(("tx", "ty", "tz"))}
        rows.append({"file": values.pop("file"), **entries, **values})
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


# ------------------------------------------------------------------------------------------------------- OpenCV's axes


def quaternions(rotation: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) [..., 4], w not negative, of rotations [..., 3, 3], float64.

    The eigenvector of the largest eigenvalue of a symmetric matrix of the rotation's entries, which is well conditioned
    for every rotation (Bar-Itzhack 2000).
    """
    r = rotation.to(torch.float64)
    k = r.new_zeros(*r.shape[:-2], 4, 4)
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    k[..., 0, 0] = trace
    for row, (i, j) in enumerate(((2, 1), (0, 2), (1, 0)), 1):
        k[..., 0, row] = k[..., row, 0] = r[..., i, j] - r[..., j, i]
    k[..., 1:, 1:] = r + r.transpose(-1, -2) - trace[..., None, None] * torch.eye(3, dtype=torch.float64)
    q = torch.linalg.eigh(k)[1][..., -1]  # of the largest eigenvalue
    return torch.where(q[..., :1] < 0, -q, q)


def _opencv_camera_to_world(posed: Sequence[PosedPicture]) -> tuple[Tensor, Tensor]:
    """Rotations [N, 3, 3] and positions [N, 3] of cameras with OpenCV axes."""
    poses = torch.stack([each.camera_to_world for each in posed]).to(torch.float64)
    return poses[:, :3, :3] * torch.tensor(OPENCV, dtype=torch.float64), poses[:, :3, 3]


def tum_text(posed: Sequence[PosedPicture]) -> str:
    """Lines of timestamp, tx ty tz, qx qy qz qw of camera-to-world; the timestamp is the picture's number, from 0."""
    rotation, position = _opencv_camera_to_world(posed)
    lines = [f"# {number} is {one_line(name)}" for number, name in enumerate(_names_in_one_folder(posed))]
    for number, (q, place) in enumerate(zip(quaternions(rotation).tolist(), position.tolist(), strict=True)):
        lines.append(_words(float(number), *place, *q[1:], q[0]))
    return "\n".join(lines) + "\n"


def colmap_files(posed: Sequence[PosedPicture]) -> dict[str, str]:
    """cameras.txt, images.txt and an empty points3D.txt: world-to-camera, one PINHOLE camera for each that differs.

    Pictures are named by their paths from the one folder that holds all of them, which is COLMAP's image folder.
    """
    intrinsics = _cameras(posed, "a COLMAP model")
    cameras = {camera: number for number, camera in enumerate(dict.fromkeys(intrinsics), 1)}
    rotation, position = _opencv_camera_to_world(posed)
    world_to_camera = rotation.transpose(-1, -2)
    translation = -(world_to_camera @ position[..., None])[..., 0]
    image_lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of points, which are none"]
    rows = zip(
        _names_in_one_folder(posed),
        intrinsics,
        quaternions(world_to_camera).tolist(),
        translation.tolist(),
        strict=True,
    )
    for number, (name, camera, q, t) in enumerate(rows, 1):
        if name != one_line(name):
            raise DataError(f"{name}: no name that a COLMAP model can hold; rename the picture")
        image_lines += [f"{number} {_words(*q, *t)} {cameras[camera]} {name}", ""]
    camera_lines = ["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS"]
    for camera, number in cameras.items():
        camera_lines.append(f"{number} PINHOLE {camera.width} {camera.height} {_words(*camera.to_list())}")
    files = {"cameras.txt": camera_lines, "images.txt": image_lines, "points3D.txt": ["# no points"]}
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


def _words(*values: float) -> str:
    return " ".join(repr(value) for value in values)


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PoseFile:
    """Poses read from a file: camera_to_world [N, 4, 4] float64, OpenGL, and N intrinsics where all are told."""

    camera_to_world: Tensor
    intrinsics: list[Intrinsics] | None


def read_poses(path: Path) -> PoseFile:
    """Poses of a transforms.json or its folder, a camera path, an array [N, 4, 4] in .npy or as `poses` in .npz, or a
    COLMAP text model; DataError, PoseError for what is missing or no pose.
    """
    if path.is_dir() and not (path / "transforms.json").is_file():
        return _colmap_poses(path)
    path = path / "transforms.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a transforms.json, camera path, .npy, .npz or COLMAP folder")
    if path.suffix.lower() == ".json":
        return _json_poses(path)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"{path}: poses are read from .json, .npy, .npz or a COLMAP folder")
    return PoseFile(_checked(_array(path), path), None)


def _array(path: Path) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as arrays:
            if "poses" not in arrays.files:
                raise DataError(f"{path}: no array 'poses' (it has {', '.join(arrays.files)}); save them as poses")
            return arrays["poses"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a readable array ({error}); save it again with numpy") from None


def _checked(matrices: Any, path: Path) -> Tensor:
    try:
        poses = torch.from_numpy(np.array(matrices, dtype=np.float64))
    except (ValueError, TypeError):
        raise DataError(f"{path}: poses are no 4x4 matrices of numbers; repair them") from None
    if poses.ndim == 2:
        poses = poses[None]
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) == 0:
        raise DataError(f"{path}: poses of shape {list(poses.shape)}; expected [N, 4, 4], N above 0")
    for number, pose in enumerate(poses):
        check_rigid(pose, f"{path}: pose {number}")
    return poses


def _json_poses(path: Path) -> PoseFile:
    try:
        values = json.loads(path.read_text())
        if "camera_path" in values:
            views = values["camera_path"]
            size = int(values["render_width"]), int(values["render_height"])
            matrices = [np.reshape(view["camera_to_world"], (4, 4)).tolist() for view in views]
            cameras: list[Intrinsics | None] = [_vertical(float(view["fov"]), *size) for view in views]
        else:
            views = [{**values, **frame} for frame in values["frames"]]  # a frame's own values come first
            matrices = [view["transform_matrix"] for view in views]
            cameras = [_pixels(view) for view in views]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: neither frames with transform_matrix nor a camera path ({error!r})") from None
    known = [camera for camera in cameras if camera is not None]
    return PoseFile(_checked(matrices, path), known if len(known) == len(cameras) else None)


def _vertical(fov_deg: float, width: int, height: int) -> Intrinsics:
    """Square pixels, centred, with a vertical field of view in degrees."""
    focal = 0.5 * height / math.tan(0.5 * math.radians(fov_deg))
    return Intrinsics(focal, focal, 0.5 * width, 0.5 * height, width, height)


def _pixels(view: dict[str, Any]) -> Intrinsics | None:
    """A frame's camera where it tells its picture's size."""
    if "w" not in view or "h" not in view:
        return None
    width, height = int(view["w"]), int(view["h"])
    if "fl_x" not in view:
        angle = view.get("camera_angle_x")
        return None if angle is None else Intrinsics.from_fov(math.degrees(angle), width, height)
    fx = float(view["fl_x"])
    fy, cx, cy = (
        float(view.get(key, other)) for key, other in (("fl_y", fx), ("cx", 0.5 * width), ("cy", 0.5 * height))
    )
    return Intrinsics(fx, fy, cx, cy, width, height)


def _colmap_poses(path: Path) -> PoseFile:
    model = find_model(path)
    if model is None:
        raise DataError(f"{path}: holds neither a transforms.json nor COLMAP's cameras.txt and images.txt")
    views = read_model(model)
    return PoseFile(torch.stack([view.camera_to_world for view in views]), [view.intrinsics for view in views])
