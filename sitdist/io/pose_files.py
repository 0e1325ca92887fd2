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
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.io.arrays import read_arrays
from sitdist.io.atomic import check_free, write_atomically, write_folder
from sitdist.io.colmap import find_model, read_model
from sitdist.io.files import read_json
from sitdist.io.transforms import camera_of, frames_of, pose_of, size_of, transforms

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


def write_poses(posed: Sequence[PosedPicture], kind: str, out: Path, overwrite: bool = False) -> None:
    """Write them to the file `out`, or for `colmap` to the new folder `out`; whole or not at all.

    DataError where `out` cannot be written, or is there and not to be written over, or where the format needs
    intrinsics that are not known.
    """
    check_free(out, overwrite and kind != "colmap")
    if kind == "colmap":
        files = colmap_files(posed)

        def write(folder: Path) -> None:
            folder.mkdir(parents=True)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")

        write_folder(out, write)
        return
    text = to_text(posed, kind, out.parent)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))


def to_text(posed: Sequence[PosedPicture], kind: str, beside: Path | None = None) -> str:
    """As one of the formats of one file; pictures are named by their path from the folder `beside` (None: as given)."""
    names = picture_names([each.path for each in posed], kind, beside)
    if kind == "jsonl":
        return "".join(
            json.dumps(_values(each, name), allow_nan=False) + "\n" for each, name in zip(posed, names, strict=True)
        )
    if kind == "csv":
        return _csv(posed, names)
    if kind == "tum":
        return tum_text(posed, names)
    poses = torch.stack([each.camera_to_world for each in posed])
    values = transforms(poses, _cameras(posed, "transforms.json"), names)
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def picture_names(pictures: Sequence[Path], kind: str, beside: Path | None = None) -> list[str]:
    """What a format's file calls every picture; DataError for a name that it cannot hold.

    COLMAP's and TUM's: the path from the folder that holds all of them, a bare name where that is the same for all. The
    others': the path from the folder `beside` (None: as given). No format escapes line breaks, but JSON; COLMAP's
    readers end a name at its first space.
    """
    if kind in ("colmap", "tum"):
        folder = Path(os.path.commonpath([picture.resolve().parent for picture in pictures]))
        names = [picture.resolve().relative_to(folder).as_posix() for picture in pictures]
    elif beside is not None:
        names = [Path(os.path.relpath(picture.resolve(), beside.resolve())).as_posix() for picture in pictures]
    else:
        names = [str(picture) for picture in pictures]
    for name in names:
        categories = {unicodedata.category(character) for character in name}
        breaks = kind in ("csv", "colmap", "tum") and categories & {"Cc", "Zl", "Zp"}  # control characters, line ends
        if "Cs" in categories or breaks or (kind == "colmap" and "Zs" in categories):
            raise DataError(
                f"{name}: a name with spaces, control characters or bytes that are no UTF-8, which the format {kind} "
                "cannot hold; rename the picture"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice and kind in ("colmap", "transforms"):
        raise DataError(f"{twice[0]}: named twice, and the format {kind} has one pose for each picture; name it once")
    return names


def _cameras(posed: Sequence[PosedPicture], what: str) -> list[Intrinsics]:
    cameras = []
    for each in posed:
        if each.intrinsics is None:
            raise DataError(f"{each.path}: its intrinsics are not known, and {what} needs them; give --intrinsics")
        cameras.append(each.intrinsics)
    return cameras


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


def _words(*values: float) -> str:
    return " ".join(repr(value) for value in values)


def tum_text(posed: Sequence[PosedPicture], names: Sequence[str]) -> str:
    """Lines of timestamp, tx ty tz, qx qy qz qw of camera-to-world; the timestamp is the picture's number, from 0."""
    rotation, position = _opencv_camera_to_world(posed)
    lines = [f"# {number} is {name}" for number, name in enumerate(names)]
    for number, (q, place) in enumerate(zip(quaternions(rotation).tolist(), position.tolist(), strict=True)):
        lines.append(_words(float(number), *place, *q[1:], q[0]))
    return "\n".join(lines) + "\n"


def colmap_files(posed: Sequence[PosedPicture]) -> dict[str, str]:
    """cameras.txt, images.txt and an empty points3D.txt: world-to-camera, one PINHOLE camera for each that differs.

    Pictures are named as `picture_names` says, from the folder that is COLMAP's image folder.
    """
    intrinsics = _cameras(posed, "a COLMAP model")
    cameras = {camera: number for number, camera in enumerate(dict.fromkeys(intrinsics), 1)}
    rotation, position = _opencv_camera_to_world(posed)
    world_to_camera = rotation.transpose(-1, -2)
    translation = -(world_to_camera @ position[..., None])[..., 0]
    image_lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of points, which are none"]
    rows = zip(
        picture_names([each.path for each in posed], "colmap"),
        intrinsics,
        quaternions(world_to_camera).tolist(),
        translation.tolist(),
        strict=True,
    )
    for number, (name, camera, q, t) in enumerate(rows, 1):
        image_lines += [f"{number} {_words(*q, *t)} {cameras[camera]} {name}", ""]
    camera_lines = ["# CAMERA_ID MODEL WIDTH HEIGHT PARAMS"]
    for camera, number in cameras.items():
        camera_lines.append(f"{number} PINHOLE {camera.width} {camera.height} {_words(*camera.to_list())}")
    files = {"cameras.txt": camera_lines, "images.txt": image_lines, "points3D.txt": ["# no points"]}
    return {name: "\n".join(lines) + "\n" for name, lines in files.items()}


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PoseFile:
    """Poses read from a file: camera_to_world [N, 4, 4] float64, OpenGL, and N intrinsics where all are told."""

    camera_to_world: Tensor
    intrinsics: list[Intrinsics] | None


def read_poses(path: Path) -> PoseFile:
    """Poses of a transforms.json or its folder, an array [N, 4, 4] in .npy or as `poses` in .npz, or a COLMAP
    model; DataError, PoseError for what is missing or no pose.
    """
    if os.path.isdir(path) and not os.path.isfile(path / "transforms.json"):
        model = find_model(path)
        if model is None:
            raise DataError(f"{path}: holds neither a transforms.json nor COLMAP's cameras and images")
        views = read_model(model)
        return PoseFile(torch.stack([view.camera_to_world for view in views]), [view.intrinsics for view in views])
    path = path / "transforms.json" if os.path.isdir(path) else path
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; give a transforms.json, .npy, .npz or COLMAP folder")
    if path.suffix.lower() in (".npy", ".npz"):
        (matrices,) = read_arrays(path, ["poses"])
        matrices = matrices[None] if matrices.ndim == 2 else matrices
        if matrices.ndim != 3 or matrices.shape[1:] != (4, 4) or len(matrices) == 0:
            raise DataError(f"{path}: poses of shape {list(matrices.shape)}; expected [N, 4, 4], N above 0")
        read = [pose_of(matrix, f"{path}: pose {number}") for number, matrix in enumerate(matrices)]
        return PoseFile(torch.stack(read), None)
    if path.suffix.lower() != ".json":
        raise DataError(f"{path}: poses are read from .json, .npy, .npz or a COLMAP folder")
    poses, cameras = [], []
    for where, frame in frames_of(read_json(path, "give a transforms.json"), path):
        poses.append(pose_of(frame.get("transform_matrix"), where))
        size = size_of(frame, where)
        if size is not None and ("fl_x" in frame or "camera_angle_x" in frame):
            cameras.append(camera_of(frame, *size, where))
    return PoseFile(torch.stack(poses), cameras if len(cameras) == len(poses) else None)
