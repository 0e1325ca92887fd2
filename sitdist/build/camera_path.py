"""The cameras of a split as files of other tools: a nerfstudio camera path, and the transforms.json to come back with.

Source: nerfstudio's documentation of its render command and of its data format.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sitdist.build.pictures import Cameras, recipe_cameras
from sitdist.config.recipe import Recipe
from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.io.atomic import check_free
from sitdist.io.files import write_json
from sitdist.io.transforms import transforms

FPS = 24  # required by the format; the path is rendered picture by picture


def write_camera_path(
    recipe: Recipe, split: str, path: Path, transforms_path: Path | None = None, overwrite: bool = False
) -> int:
    """Write the cameras of a recipe's split to `path`, in the order of its samples; return their number.

    `transforms_path`: also write a transforms.json that names their pictures 00000.png and on. ConfigError for an
    unknown split; DataError for cameras that a camera path cannot express, and without `overwrite` for existing files.
    """
    for file in filter(None, (path, transforms_path)):
        check_free(file, overwrite)
    cameras = recipe_cameras(recipe, split)
    write_json(path, camera_path(cameras, split))
    if transforms_path is not None:
        write_json(transforms_path, transforms(cameras.camera_to_world, cameras.intrinsics))
    return len(cameras.intrinsics)


def camera_path(cameras: Cameras, split: str) -> dict[str, Any]:
    """The cameras in nerfstudio's form: camera_to_world as 16 numbers, row by row; fov is vertical and in degrees."""
    views = [
        {
            "camera_to_world": pose.flatten().tolist(),
            "fov": _vertical_fov_deg(camera, f"{split} view {number}"),
            "aspect": camera.width / camera.height,
        }
        for number, (pose, camera) in enumerate(zip(cameras.camera_to_world, cameras.intrinsics, strict=True))
    ]
    return {
        "camera_type": "perspective",
        "render_height": cameras.intrinsics[0].height,
        "render_width": cameras.intrinsics[0].width,
        "camera_path": views,
        "fps": FPS,
        "seconds": len(views) / FPS,
    }


def _vertical_fov_deg(camera: Intrinsics, name: str) -> float:
    if camera.fx != camera.fy or (camera.cx, camera.cy) != (0.5 * camera.width, 0.5 * camera.height):
        raise DataError(
            f"{name}: fx {camera.fx:g}, fy {camera.fy:g}, cx {camera.cx:g}, cy {camera.cy:g}; a camera path knows only "
            "square pixels and a centred principal point"
        )
    return math.degrees(2.0 * math.atan(0.5 * camera.height / camera.fy))
