"""Render pictures of a scene to files, with a transforms.json of their cameras, as `sources` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sitdist.build.writer import open_splits
from sitdist.config.recipe import Recipe, SceneSource
from sitdist.errors import ConfigError
from sitdist.geometry.camera import Intrinsics, full_turn, orbit
from sitdist.io.atomic import check_free, write_folder
from sitdist.io.files import require_memory, write_json
from sitdist.io.transforms import transforms
from sitdist.io.video import save_gif
from sitdist.scene.views import backdrop, look, open_scene

GIF_PER_SECOND = 16.0  # frames


@dataclass(frozen=True)
class Cameras:
    """The cameras of pictures: camera_to_world [N, 4, 4] float64 in the scene's frame, and N intrinsics."""

    camera_to_world: Tensor
    intrinsics: list[Intrinsics]


def turntable_cameras(views: int, radius: float, elevation_deg: float, fov_deg: float, size: int) -> Cameras:
    """A closed circle of `views` cameras that look at the origin, in pictures of `size` x `size` pixels.

    ConfigError for a field of view that no pinhole camera has.
    """
    if not 1.0 < fov_deg < 170.0:
        raise ConfigError(f"--fov {fov_deg:g}: a field of view is between 1 and 170 degrees")
    require_memory(350 * views, f"a turntable of {views:,} views", "ask for fewer views")
    cameras = orbit(full_turn(views), elevation_deg, radius)
    return Cameras(cameras, [Intrinsics.from_fov(fov_deg, size, size)] * views)


def recipe_cameras(recipe: Recipe, split: str) -> Cameras:
    """The cameras of a recipe's split in the order of its samples, without zoomed copies; ConfigError if unknown."""
    splits = open_splits(recipe)
    if split not in splits:
        raise ConfigError(f"--split {split}: the recipe has no such split; it has {', '.join(splits)}")
    chosen = splits[split]
    views = chosen.indices[~chosen.is_zoomed].tolist()
    return Cameras(chosen.source.camera_to_world[views], [chosen.source.intrinsics(view) for view in views])


def write_pictures(
    scene_folder: str | None,
    cameras: Cameras,
    out: Path,
    supersample: int = SceneSource.model_fields["supersample"].default,
    background: tuple[float, float, float] | None = None,
    alpha: bool = False,
    gif: bool = False,
) -> int:
    """Render 00000.png and on into the new folder `out`, with transforms.json; return the number of pictures.

    `scene_folder`: a fitted scene, or None for the built-in object. `background`: overrides the scene's background.
    `alpha`: write RGBA images with a transparent background. `gif`: also write turntable.gif, a loop of all pictures.
    DataError if `out` exists. The folder appears only when it is complete.
    """
    check_free(out)
    if gif and cameras.intrinsics:
        pixels = len(cameras.intrinsics) * cameras.intrinsics[0].width * cameras.intrinsics[0].height
        require_memory(3 * pixels, f"a GIF of {len(cameras.intrinsics):,} views", "ask for fewer or smaller views")
    scene = open_scene(scene_folder)
    behind = backdrop(scene, background)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        shown = []
        pairs = zip(cameras.camera_to_world, cameras.intrinsics, strict=True)
        for number, (pose, intrinsics) in enumerate(tqdm(pairs, "views", len(cameras.intrinsics), unit="view")):
            seen = look(scene, pose, intrinsics, supersample)
            opacity = (1.0 - seen.through)[..., None]  # [H, W, 1]
            own = torch.cat([seen.light / opacity.clamp_min(1e-6), opacity], dim=-1)
            picture = _to_image(own if alpha else seen.on(behind))
            picture.save(folder / f"{number:05d}.png")
            shown.append(_to_image(seen.on(behind)) if gif else None)
        if gif:
            save_gif([frame for frame in shown if frame is not None], folder / "turntable.gif", GIF_PER_SECOND)
        write_json(folder / "transforms.json", transforms(cameras.camera_to_world, cameras.intrinsics))

    write_folder(out, write)
    return len(cameras.intrinsics)


def _to_image(pixels: Tensor) -> Image.Image:
    """Convert [H, W, 3 or 4] in [0, 1] to an 8-bit picture."""
    return Image.fromarray((pixels.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy())


def background_of(values: Sequence[float] | None) -> tuple[float, float, float] | None:
    """Three shares as a colour; None stays None."""
    return None if values is None else (values[0], values[1], values[2])
