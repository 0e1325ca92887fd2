"""A split's cameras as files of other tools: a nerfstudio camera path, and the transforms.json to come back with.

Source: nerfstudio's documentation of its render command and of its data format.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sitdist.build.shard import Split
from sitdist.build.writer import open_splits
from sitdist.config.recipe import Recipe
from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.io.atomic import check_free
from sitdist.io.json_file import write_json
from sitdist.io.transforms import transforms

FPS = 24  # a path has a speed, but is rendered picture by picture


def write_camera_path(
    recipe: Recipe, split: str, path: Path, transforms: Path | None = None, overwrite: bool = False
) -> int:
    """Write the cameras of a recipe's split to `path`, in order of its samples; returns how many there are.

    `transforms`: where to write also a transforms.json that names their pictures 00000.png and on, beside it.
    ConfigError for a split that is not there; DataError for cameras that a camera path cannot say, and for a file that
    is there, without `overwrite`.
    """
    for file in filter(None, (path, transforms)):
        check_free(file, overwrite)
    splits = open_splits(recipe)
    if split not in splits:
        raise ConfigError(f"--split {split}: the recipe has no such split; it has {', '.join(splits)}")
    chosen = splits[split]
    chosen = Split(split, chosen.source, chosen.indices[~chosen.is_zoomed])  # copies are made of pictures, when built
    write_json(path, camera_path(chosen))
    if transforms is not None:
        write_json(transforms, transforms_of(chosen))
    return len(chosen)


def camera_path(split: Split) -> dict[str, Any]:
    """The cameras in nerfstudio's form: camera_to_world as 16 numbers, row by row; fov is vertical and in degrees."""
    cameras = [
        {
            "camera_to_world": split.source.camera_to_world[view].flatten().tolist(),
            "fov": _vertical_fov_deg(split.source.intrinsics(view), f"{split.name} view {view}"),
            "aspect": split.source.intrinsics(view).width / split.source.intrinsics(view).height,
        }
        for view in split.indices.tolist()
    ]
    first = split.source.intrinsics(int(split.indices[0]))
    return {
        "camera_type": "perspective",
        "render_height": first.height,
        "render_width": first.width,
        "camera_path": cameras,
        "fps": FPS,
        "seconds": len(cameras) / FPS,
    }


def transforms_of(split: Split) -> dict[str, Any]:
    """The same cameras as a transforms.json; picture k of the path is k.png, with five digits."""
    views = split.indices.tolist()
    return transforms(split.source.camera_to_world[views], [split.source.intrinsics(view) for view in views])


def _vertical_fov_deg(camera: Intrinsics, name: str) -> float:
    if camera.fx != camera.fy or (camera.cx, camera.cy) != (0.5 * camera.width, 0.5 * camera.height):
        raise DataError(
            f"{name}: fx {camera.fx:g}, fy {camera.fy:g}, cx {camera.cx:g}, cy {camera.cy:g}; a camera path knows only "
            "square pixels and a centred principal point"
        )
    return math.degrees(2.0 * math.atan(0.5 * camera.height / camera.fy))
