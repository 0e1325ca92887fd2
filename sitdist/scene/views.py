"""Random cameras around a scene, and their pictures: of the built-in object or of a fitted scene.

Camera i is a pure function of (seed, i).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sitdist.config.recipe import SceneSource
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, look_at, rolled, shell_positions
from sitdist.scene.field import Solids, chair
from sitdist.scene.volume import BACKGROUND, Rendered, picture, render_solids

if TYPE_CHECKING:
    from sitdist.scene.store import Scene

Colour = tuple[float, float, float]


def random_cameras(config: SceneSource, positions: Tensor) -> Tensor:
    """camera_to_world [N, 4, 4] (float64) of the views at `positions` [N]; radius bins take turns."""
    uniforms = draws.uniform(config.seed, "cameras", positions, 3)
    return _cameras(config, uniforms, *_radii(config, positions), _options(config, positions))


def random_fov_deg(config: SceneSource, positions: Tensor) -> Tensor:
    """The horizontal fields of view [N] of these views, in degrees, float64."""
    return _fov_deg(config, _options(config, positions))


def evaluation_cameras(
    config: SceneSource, seed: int, positions: Tensor, radius: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Other cameras [N, 4, 4] of the source, at another distance, and their fields of view [N] in degrees; float64."""
    uniforms = draws.uniform(seed, "evaluation cameras", positions, 3)
    options = draws.uniform(seed, "evaluation camera options", positions, 5)
    low, high = (torch.full_like(uniforms[:, 0], edge) for edge in radius)
    return _cameras(config, uniforms, low, high, options), _fov_deg(config, options)


def _cameras(config: SceneSource, uniforms: Tensor, low: Tensor, high: Tensor, options: Tensor) -> Tensor:
    """Cameras between two distances [N], from uniform numbers [N, 3] for the place and [N, 5] for `_options`."""
    elevation = config.elevation_deg or (0.0 if config.sphere == "upper" else -90.0, 90.0)
    place = shell_positions(uniforms, low, high, elevation, config.azimuth_deg)
    target = config.target_jitter * _in_unit_ball(options[:, 0:3])
    return rolled(look_at(place, target), config.roll_deg * (2.0 * options[:, 3] - 1.0))


def _fov_deg(config: SceneSource, options: Tensor) -> Tensor:
    low, high = config.fov_range_deg or (config.fov_deg, config.fov_deg)
    return low + (high - low) * options[:, 4]


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


def open_scene(folder: str | None, device: torch.device | str = "cpu") -> Solids | Scene:
    """The built-in object, or the scene in a folder, on a device; DataError if there is none."""
    if folder is None:
        return chair()
    from sitdist.scene.store import load_scene

    return load_scene(Path(folder), device)


def border_pixels(images: Tensor) -> Tensor:
    """The pixels [P, 3] along the borders of images [N, 3, H, W]."""
    edges = [images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]]  # [N, 3, W or H]
    return torch.cat([edge.transpose(1, 2).reshape(-1, 3) for edge in edges])


def scene_files(folder: str) -> list[Path]:
    """The files that a fitted scene's pictures depend on."""
    from sitdist.scene.store import FIELD_FILE, SCENE_FILE

    return [Path(folder) / name for name in (SCENE_FILE, FIELD_FILE)]


def capture_similarity(scene: Solids | Scene) -> dict[str, Any] | None:
    """The similarity from the photos' frame to the frame of the scene's poses; None where they are the same."""
    if isinstance(scene, Solids) or scene.frame == "capture":
        return None
    return scene.similarity.to_dict()


@torch.no_grad()
def look(scene: Solids | Scene, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int) -> Rendered:
    """Render a camera [4, 4] in the scene's frame, [H, W, 3], [H, W]; each pixel averages supersample^2 rays."""
    if isinstance(scene, Solids):
        return picture(partial(render_solids, scene), camera_to_world, intrinsics, supersample)
    return scene.look(camera_to_world, intrinsics, supersample)


def render(
    scene: Solids | Scene,
    camera_to_world: Tensor,
    intrinsics: Intrinsics,
    supersample: int,
    background: Colour | None = None,
) -> Tensor:
    """The same as a picture [3, H, W], float32 in steps of 1/255; `background` overrides the scene's own."""
    seen = look(scene, camera_to_world, intrinsics, supersample).on(backdrop(scene, background))
    return (seen.permute(2, 0, 1).clamp(0.0, 1.0) * 255.0).round() / 255.0


def backdrop(scene: Solids | Scene, background: Colour | None = None) -> Tensor:
    """The colour [3] behind a scene: `background`, or else its own."""
    if background is not None:
        return torch.tensor(background)
    return torch.tensor(BACKGROUND) if isinstance(scene, Solids) else scene.field.background
