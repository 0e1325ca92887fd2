"""Posed photos for a scene fit: .npz files, a transforms.json, or a COLMAP model; of any one size.

Pictures with alpha are put on one background colour.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.distortion import undistorted
from sitdist.io.arrays import npz_files, read_posed_array
from sitdist.io.atomic import file_sha256
from sitdist.io.colmap import find_model, model_files, read_model
from sitdist.io.files import require_memory, sha256_of
from sitdist.io.images import SUFFIXES, check_camera_size, picture_sizes, to_pixels
from sitdist.io.transforms import (
    MissingPicture,
    PosedFile,
    check_distinct,
    find_picture,
    read_posed_files,
    transforms_file,
)
from sitdist.scene.fit import Photos

Colour = tuple[float, float, float]
WHITE = (1.0, 1.0, 1.0)


def read_photos(path: Path, background: Colour | None = None, images: Path | None = None) -> Photos:
    """The photos at `path`; transparent ones lie on `background` (None: white).

    An .npz file or a folder of them (images, poses, focal); a transforms.json or its folder; a COLMAP workspace with
    a model, whose pictures are in `images` (None: the folder images/ beside the model or above it, or `path`).
    Pictures through a lens with distortion are made a pinhole camera's; what they do not show is transparent.
    DataError, PoseError for what is missing or cannot be used.
    """
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder; give posed photos: .npz, transforms.json or a COLMAP folder")
    if path.suffix == ".npz" or any(path.glob("*.npz")):
        return _npz_photos(path)
    files, posed = posed_files(path, images)
    if not files:
        found = any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")) if path.is_dir() else False
        what = "photos without poses" if found else "no posed photos"
        raise DataError(
            f"{path}: {what}; expected .npz files, a transforms.json, or COLMAP's cameras and images (run "
            "COLMAP on the photos)"
        )
    return _photos(posed, files, background or WHITE)


def posed_files(
    path: Path, images: Path | None = None, missing: list[str] | None = None
) -> tuple[list[Path], list[PosedFile]]:
    """The files of a transforms.json or a COLMAP model, and what they pose; two empty lists where there is neither.

    `images` as for `read_photos`, `missing` as for `read_posed_files`.
    """
    if path.suffix == ".json" or (path / "transforms.json").is_file():
        file = transforms_file(path)
        return [file], read_posed_files(file, missing)
    model = find_model(path) if path.is_dir() else None
    return ([], []) if model is None else _colmap_files(path, model, images, missing)


def _npz_photos(path: Path) -> Photos:
    files = npz_files([path], "give posed photos")
    arrays = [read_posed_array(file) for file in files]
    intrinsics = [array.intrinsics for array in arrays for _ in range(len(array.images))]
    images = [
        array.images if array.images.dtype == np.uint8 else array.images.astype(np.float32).clip(0.0, 1.0)
        for array in arrays
    ]
    if len({(each.shape[1:], each.dtype) for each in images}) > 1:
        raise DataError(
            f"{path}: {_sizes(intrinsics)} in several files, or of several types; make all photos of one size and type"
        )
    return Photos(
        torch.cat([torch.from_numpy(each).permute(0, 3, 1, 2) for each in images]),
        torch.cat([array.camera_to_world for array in arrays]),
        intrinsics,
        _fingerprint(files, ()),
    )


def _colmap_files(
    path: Path, model: Path, folder: Path | None, missing: list[str] | None
) -> tuple[list[Path], list[PosedFile]]:
    views, (cameras, listed) = read_model(model), model_files(model)
    places = [folder] if folder else [model / "images", path / "images", model.parent / "images", path]
    found = next((place for place in places if any(os.path.isfile(place / view.name) for view in views)), places[-1])
    posed = []
    for view in views:
        try:
            picture = find_picture(found, view.name, f"{listed}: {view.name}")
        except MissingPicture:
            if missing is None:
                raise
            missing.append(view.name)
            continue
        told = (view.intrinsics.width, view.intrinsics.height)
        check_camera_size(*picture_sizes(picture), told, str(picture))
        posed.append(PosedFile(picture, view.camera_to_world, view.intrinsics, view.distortion))
    check_distinct((each.picture for each in posed), listed)
    return [cameras, listed], posed


def _photos(posed: Sequence[PosedFile], files: Sequence[Path], background: Colour) -> Photos:
    """Pictures that `files` pose, read; DataError unless they are of one size."""
    first = posed[0].intrinsics
    for each in posed:
        camera = each.intrinsics
        if (camera.width, camera.height) != (first.width, first.height):
            raise DataError(
                f"{each.picture}: {camera.width}x{camera.height} pixels but {posed[0].picture.name} has "
                f"{first.width}x{first.height}; bring all photos to one size (and their focal lengths with them)"
            )
    need = 2 * len(posed) * 4 * first.width * first.height  # each, and all together
    require_memory(need, f"{files[0]}: {len(posed)} photos", "give fewer, or smaller ones")
    images, opacities = zip(*(_read_picture(each, background) for each in posed), strict=True)
    opacity = None if any(each is None for each in opacities) else torch.stack(opacities)
    return Photos(
        torch.stack(images),
        torch.stack([each.camera_to_world for each in posed]),
        [each.intrinsics for each in posed],
        _fingerprint([*files, *(each.picture for each in posed)], background),
        opacity,
        None if opacity is None else background,
    )


def _read_picture(posed: PosedFile, background: Colour) -> tuple[Tensor, Tensor | None]:
    """What a pinhole camera sees, uint8 [3, H, W], on `background` where it is transparent, and its alpha [H, W]."""
    colour, alpha = pinhole_pixels(posed)
    colour = (255.0 * colour).round()  # 16 bits are made 8
    if alpha is not None:
        colour = colour * alpha + 255.0 * torch.tensor(background)[:, None, None] * (1.0 - alpha)
    return colour.round().to(torch.uint8), None if alpha is None else (255.0 * alpha).round().to(torch.uint8)


def pinhole_pixels(posed: PosedFile) -> tuple[Tensor, Tensor | None]:
    """`to_pixels` of the picture without its lens's distortion; what it does not show is transparent."""
    colour, alpha = to_pixels(posed.picture, str(posed.picture))
    if posed.distortion is None:
        return colour, alpha
    opacity = torch.ones_like(colour[:1]) if alpha is None else alpha[None]
    light, _ = undistorted(torch.cat([colour * opacity, opacity]), posed.intrinsics, posed.distortion)
    return (light[:3] / light[3:].clamp_min(1e-6)).clamp(0.0, 1.0), light[3]


def _fingerprint(files: Sequence[Path], background: Sequence[float]) -> str:
    return sha256_of(str(tuple(background)).encode(), *(file_sha256(file).encode() for file in files))


def _sizes(intrinsics: Sequence[Intrinsics]) -> str:
    sizes = sorted({f"{each.width}x{each.height}" for each in intrinsics})
    return " and ".join(sizes) + " pixels"
