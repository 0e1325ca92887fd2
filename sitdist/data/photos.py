"""Posed photos for a scene fit: .npz files, a transforms.json, or a COLMAP text model; of any one size.

Pictures with alpha are put on one background colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.data.colmap import find_model, read_model
from sitdist.data.sources import (
    DISTORTION,
    PINHOLE_MODELS,
    _check_pixels,
    _npz_files,
    _number,
    _opened,
    _read_npz,
    _sha256,
)
from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import check_rigid
from sitdist.io.atomic import file_sha256
from sitdist.scene.fit import Photos

Colour = tuple[float, float, float]
WHITE = (1.0, 1.0, 1.0)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def read_photos(path: Path, background: Colour | None = None, images: Path | None = None) -> Photos:
    """The photos at `path`; transparent ones lie on `background` (None: white).

    An .npz file or a folder of them (images, poses, focal); a transforms.json or its folder; a COLMAP workspace with
    a text model, whose pictures are in `images` (None: the folder images/ beside the model or above it, or `path`).
    DataError, PoseError for what is missing or cannot be used.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give posed photos: .npz, transforms.json or a COLMAP folder")
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        return _npz_photos(path)
    if path.suffix == ".json" or (path / "transforms.json").is_file():
        return _transforms_photos(path, background or WHITE)
    model = find_model(path) if path.is_dir() else None
    if model is None:
        found = any(file.suffix.lower() in PICTURES for file in path.rglob("*")) if path.is_dir() else False
        what = "photos without poses" if found else "no posed photos"
        raise DataError(
            f"{path}: {what}; expected .npz files, a transforms.json, or COLMAP's cameras.txt and images.txt (run "
            "COLMAP on the photos and write its model as text)"
        )
    return _colmap_photos(path, model, images, background or WHITE)


def _npz_photos(path: Path) -> Photos:
    images, poses, intrinsics = [], [], []
    files = _npz_files([str(path)])
    for file in files:
        array, camera_to_world, focal = _read_npz(file)
        if array.dtype != np.uint8:
            for row in range(len(array)):
                _check_pixels(array[row], f"{file}: image {row}")
            array = array.astype(np.float32).clip(0.0, 1.0)
        height, width = array.shape[1:3]
        images.append(torch.from_numpy(array).permute(0, 3, 1, 2))
        poses.append(camera_to_world)
        intrinsics += [Intrinsics(focal, focal, 0.5 * width, 0.5 * height, width, height)] * len(array)
    if len({(each.shape[1:], each.dtype) for each in images}) > 1:
        raise DataError(
            f"{path}: {_sizes(intrinsics)} in several files, or of several types; make all photos of one size and type"
        )
    return Photos(torch.cat(images), torch.cat(poses), intrinsics, _fingerprint(files, ()))


def _transforms_photos(path: Path, background: Colour) -> Photos:
    file = path / "transforms.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the path of a transforms.json or its folder")
    try:
        values = json.loads(file.read_text())
        frames = [{**values, **frame} for frame in values["frames"]]  # a frame's own values come first
        names = [str(frame["file_path"]) for frame in frames]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: no list of frames with file_path ({error!r})") from None
    if not frames:
        raise DataError(f"{file}: holds no frames")
    poses = [_frame_pose(frame, f"{file}: frame {name}") for frame, name in zip(frames, names, strict=True)]
    pictures = [_picture_file(file.parent, name, file) for name in names]
    width, height = _one_size(pictures)
    intrinsics = [
        _frame_camera(frame, width, height, f"{file}: frame {name}") for frame, name in zip(frames, names, strict=True)
    ]
    images = torch.stack([_read_picture(picture, background) for picture in pictures])
    return Photos(images, torch.stack(poses), intrinsics, _fingerprint([file, *pictures], background))


def _frame_pose(frame: dict[str, Any], name: str) -> Tensor:
    if "transform_matrix" not in frame:
        raise DataError(f"{name}: a photo without a pose; give its transform_matrix, or remove the frame")
    try:
        pose = torch.from_numpy(np.array(frame["transform_matrix"], dtype=np.float64))
    except (ValueError, TypeError):
        raise DataError(f"{name}: transform_matrix is not a 4x4 matrix of numbers; repair it") from None
    check_rigid(pose, name)
    return pose


def _frame_camera(frame: dict[str, Any], width: int, height: int, name: str) -> Intrinsics:
    """A frame's pinhole camera for pictures of width x height pixels; DataError where it is none."""
    model = frame.get("camera_model", "PINHOLE")
    if model not in PINHOLE_MODELS:
        raise DataError(f"{name}: camera_model {model} is no pinhole camera; undistort the photos first")
    for key in DISTORTION:
        if _number(frame, key, 0.0, name) != 0.0:
            raise DataError(f"{name}: distortion {key} is {frame[key]}, but a pinhole camera has none; undistort first")
    for key, size in (("w", width), ("h", height)):
        if _number(frame, key, size, name) != size:
            raise DataError(
                f"{name}: {key} is {frame[key]} but its picture has {size}; fl_x, cx and the like are in "
                "pixels: scale them as the picture was, and set w and h"
            )
    if "fl_x" not in frame:
        angle = _number(frame, "camera_angle_x", 0.0, name)
        if not 0.0 < angle < math.pi:
            raise DataError(
                f"{name}: no fl_x, and camera_angle_x is {frame.get('camera_angle_x')}; give the focal length in "
                "pixels, or the angle of view in radians"
            )
        return Intrinsics.from_fov(math.degrees(angle), width, height)
    fx = _number(frame, "fl_x", 0.0, name)
    fy = _number(frame, "fl_y", fx, name)
    if fx <= 0 or fy <= 0:
        raise DataError(f"{name}: focal lengths {fx:g} and {fy:g}; expected positive numbers of pixels")
    cx, cy = _number(frame, "cx", 0.5 * width, name), _number(frame, "cy", 0.5 * height, name)
    return Intrinsics(fx, fy, cx, cy, width, height)


def _colmap_photos(path: Path, model: Path, folder: Path | None, background: Colour) -> Photos:
    views = read_model(model)
    places = [folder] if folder else [model / "images", path / "images", model.parent / "images", path]
    found = next((place for place in places if (place / views[0].name).is_file()), places[-1])
    pictures = [_picture_file(found, view.name, model / "images.txt") for view in views]
    width, height = _one_size(pictures)
    for view, picture in zip(views, pictures, strict=True):
        if (view.intrinsics.width, view.intrinsics.height) != (width, height):
            raise DataError(
                f"{picture}: {width}x{height} pixels but its camera in {model / 'cameras.txt'} has "
                f"{view.intrinsics.width}x{view.intrinsics.height}; scale the model's cameras as the photos were"
            )
    images = torch.stack([_read_picture(picture, background) for picture in pictures])
    files = [model / "cameras.txt", model / "images.txt", *pictures]
    poses = torch.stack([view.camera_to_world for view in views])
    return Photos(images, poses, [view.intrinsics for view in views], _fingerprint(files, background))


def _picture_file(folder: Path, name: str, source: Path) -> Path:
    path = folder / name
    for candidate in (path, path.with_name(path.name + ".png")):
        if candidate.is_file():
            return candidate
    raise DataError(f"{source}: photo {name} is missing (looked for {path}); restore it or remove its entry")


def _one_size(pictures: Sequence[Path]) -> tuple[int, int]:
    """Width and height of all the pictures; DataError if they differ."""
    first: tuple[int, int] | None = None
    for path in pictures:
        with _opened(path) as picture:
            size = picture.size
        first = first or size
        if size != first:
            raise DataError(
                f"{path}: {size[0]}x{size[1]} pixels but {pictures[0].name} has {first[0]}x{first[1]}; bring all "
                "photos to one size (and their focal lengths with them)"
            )
    assert first is not None
    return first


def _read_picture(path: Path, background: Colour) -> Tensor:
    """uint8 [3, H, W], on `background` where it is transparent."""
    with _opened(path) as picture:
        rgba = np.asarray(picture.convert("RGBA"))
    if (rgba[..., 3] == 255).all():
        return torch.from_numpy(rgba[..., :3].copy()).permute(2, 0, 1)
    alpha = rgba[..., 3:].astype(np.float32) / np.float32(255.0)
    on = rgba[..., :3] * alpha + np.float32(255.0) * np.asarray(background, dtype=np.float32) * (1.0 - alpha)
    return torch.from_numpy(on.round().astype(np.uint8)).permute(2, 0, 1)


def _fingerprint(files: Sequence[Path], background: Sequence[float]) -> str:
    return _sha256(str(tuple(background)).encode(), *(file_sha256(file).encode() for file in files))


def _sizes(intrinsics: Sequence[Intrinsics]) -> str:
    sizes = sorted({f"{each.width}x{each.height}" for each in intrinsics})
    return " and ".join(sizes) + " pixels"
