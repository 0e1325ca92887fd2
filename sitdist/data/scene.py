"""Random cameras about a scene, and their pictures: of the built-in object, or of a scene fitted to photos.

Camera i is a pure function of (seed, i).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sitdist.config import SceneSource
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, camera_rays, look_at, rolled, shell_positions
from sitdist.scene.field import Solids, chair
from sitdist.scene.volume import BACKGROUND, composite

if TYPE_CHECKING:
    from sitdist.scene.store import Scene

Colour = tuple[float, float, float]


def random_cameras(config: SceneSource, positions: Tensor) -> Tensor:
    """camera_to_world [N, 4, 4] (float64) of the views at `positions` [N]; radius bins take turns."""
    uniforms = draws.uniform(config.seed, "cameras", positions, 3)
    low, high = _radii(config, positions)
    elevation = config.elevation_deg or (0.0 if config.sphere == "upper" else -90.0, 90.0)
    place = shell_positions(uniforms, low, high, elevation, config.azimuth_deg)
    options = _options(config, positions)
    target = config.target_jitter * _in_unit_ball(options[:, 0:3])
    return rolled(look_at(place, target), config.roll_deg * (2.0 * options[:, 3] - 1.0))


def random_fov_deg(config: SceneSource, positions: Tensor) -> Tensor:
    """The horizontal fields of view [N] of these views, in degrees, float64."""
    low, high = config.fov_range_deg or (config.fov_deg, config.fov_deg)
    return low + (high - low) * _options(config, positions)[:, 4]


def _options(config: SceneSource, positions: Tensor) -> Tensor:
    """Uniform numbers [N, 5] in (0, 1) for what is optional: where a camera looks (3), its roll, its field of view."""
    return draws.uniform(config.seed, "camera options", positions, 5)


def _radii(config: SceneSource, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest radius [N] of these views: the edges of their bins."""
    edges = torch.tensor(config.radius_bins or config.radius, dtype=torch.float64)
    bin_ = positions % (len(edges) - 1)
    return edges[bin_], edges[bin_ + 1]


def _in_unit_ball(uniforms: Tensor) -> Tensor:
    """Points [N, 3] uniform in the ball of radius 1, from uniform numbers [N, 3]."""
    z = 2.0 * uniforms[:, 0] - 1.0
    angle, ring = 2.0 * math.pi * uniforms[:, 1], (1.0 - z.square()).sqrt()
    direction = torch.stack([ring * angle.cos(), ring * angle.sin(), z], dim=-1)
    return uniforms[:, 2:3] ** (1.0 / 3.0) * direction


# ------------------------------------------------------------------------------------------------------------ pictures


def open_scene(folder: str | None) -> Solids | Scene:
    """The built-in object, or the scene in a folder; DataError if there is none."""
    if folder is None:
        return chair()
    from sitdist.scene.store import load_scene

    return load_scene(Path(folder))


def scene_background(folder: str | None) -> Tensor:
    """The colour [3] behind the built-in object, or behind the scene in a folder."""
    scene = open_scene(folder)
    return torch.tensor(BACKGROUND) if isinstance(scene, Solids) else scene.field.background


def scene_files(folder: str) -> list[Path]:
    """The files that a fitted scene's pictures depend on."""
    from sitdist.scene.store import FIELD_FILE, SCENE_FILE

    return [Path(folder) / name for name in (SCENE_FILE, FIELD_FILE)]


def capture_similarity(scene: Solids | Scene) -> dict[str, Any] | None:
    """What took the frame of the photos to that of the scene's poses; None where it is the same, or none is known."""
    if isinstance(scene, Solids) or scene.frame == "capture":
        return None
    return scene.similarity.to_dict()


@torch.no_grad()
def render(
    scene: Solids | Scene, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int, background: Colour | None
) -> Tensor:
    """Picture [3, H, W] of a scene, float32 in steps of 1/255, from a camera [4, 4] in the scene's frame.

    Every pixel is the mean of supersample^2 rays. `background`: in the place of the scene's own.
    """
    if isinstance(scene, Solids):
        picture = _render_solids(scene, camera_to_world, intrinsics.scaled(supersample), background or BACKGROUND)
        picture = torch.nn.functional.avg_pool2d(picture[None], supersample)[0]
    else:
        if background is not None:
            field = dataclasses.replace(scene.field, background=torch.tensor(background))
            scene = dataclasses.replace(scene, field=field)
        picture = scene.render(camera_to_world[None], intrinsics, supersample)[0]
    return (picture.clamp(0.0, 1.0) * 255.0).round() / 255.0


def _render_solids(solids: Solids, camera_to_world: Tensor, intrinsics: Intrinsics, background: Colour) -> Tensor:
    """Picture [3, H, W] by exact absorption in homogeneous solids, whose colour is as at the entry; a ray a pixel."""
    origins, directions = (rays.reshape(-1, 3).float() for rays in camera_rays(camera_to_world, intrinsics))
    enter, leave = solids.intervals(origins, directions)  # [R, K]
    colour = solids.texture(origins[:, None] + enter[..., None] * directions[:, None])
    order = enter.argsort(dim=-1, stable=True)
    optical_depth = (solids.density * (leave - enter)).gather(1, order)
    colour = colour.gather(1, order[..., None].expand_as(colour))
    rays = composite(optical_depth, colour, origins.new_tensor(background))
    return rays.reshape(intrinsics.height, intrinsics.width, 3).permute(2, 0, 1)
