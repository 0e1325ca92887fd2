"""Volume rendering: colour along a ray is what every stretch emits times what the stretches before it let through.

One compositing rule serves solids, whose stretches are known in closed form, and any other field, by marching.
Source: Max, "Optical models for direct volume rendering", 1995; the quadrature of Mildenhall et al., "NeRF", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sitdist.geometry.camera import Intrinsics, camera_rays
from sitdist.scene.field import Solids, chair

Field = Callable[[Tensor], tuple[Tensor, Tensor]]
BACKGROUND = (0.5, 0.5, 0.5)
OPAQUE = 1e-3  # a ray of which less than this is left is not followed any further


class SkippingField(Protocol):
    """A radiance field within a box that knows where it is empty."""

    box: Tensor  # [2, 3], lower and upper corner
    background: Tensor  # [3]

    def occupied(self, points: Tensor) -> Tensor:
        """Which of the points [P, 3] are in cells that are not empty; bool [P]."""

    def density(self, points: Tensor) -> Tensor:
        """Density [P] at points [P, 3]."""

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and colour [P, 3] at points [P, 3], seen along unit directions [P, 3]."""


class Rendered(NamedTuple):
    """Colours [R, 3] of rays, and the share of the background in each, [R]."""

    colour: Tensor
    through: Tensor


def transmission(optical_depth: Tensor) -> Tensor:
    """What is left of a ray behind each of its stretches in order, [R, K]; optical depth [R, K]."""
    return torch.exp(-optical_depth.cumsum(-1))


def composite(optical_depth: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Colours [R, 3] of rays with stretches in order: optical depth [R, K], colour [R, K, 3], on `background` [3]."""
    through = transmission(optical_depth)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    weight = before - through
    return (weight[..., None] * colour).sum(-2) + through[:, -1:] * background


def march(field: Field, origins: Tensor, directions: Tensor, near: float, far: float, samples: int) -> Tensor:
    """Colours [R, 3] of rays [R, 3] through any field, by `samples` equal stretches, each as at its middle."""
    step = (far - near) / samples
    distance = near + step * (torch.arange(samples, dtype=origins.dtype, device=origins.device) + 0.5)
    points = origins[:, None] + distance[:, None] * directions[:, None]  # [R, S, 3]
    density, colour = field(points.reshape(-1, 3))
    shape = points.shape[:2]
    return composite(density.reshape(shape) * step, colour.reshape(*shape, 3), origins.new_tensor(BACKGROUND))


def march_occupied(
    field: SkippingField, origins: Tensor, directions: Tensor, step: float, offset: Tensor | float = 0.5
) -> Rendered:
    """Rays [R, 3] through a field that knows where it is empty, in stretches of length `step`.

    Every stretch is as at one point of it: at `offset` of its length, a number or one for each ray, [R]. Stretches in
    empty cells and those that no light reaches (below OPAQUE) are left out; gradients flow through all others.
    """
    ray, distance = _occupied_stretches(field, origins, directions, step, offset)
    with torch.no_grad():
        points = origins[ray] + distance[:, None] * directions[ray]
        reached = _reached(field.density(points) * step, ray, len(origins))
    ray, points = ray[reached], points[reached]
    density, colour = field.radiance(points, directions[ray])
    slot, longest = _slots(ray, len(origins))
    optical_depth = density.new_zeros(len(origins), longest).index_put((ray, slot), density * step)
    colour = colour.new_zeros(len(origins), longest, 3).index_put((ray, slot), colour)
    return Rendered(composite(optical_depth, colour, field.background), transmission(optical_depth)[:, -1])


def box_interval(box: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [R] at which rays [R, 3] enter and leave a box [2, 3], from the ray's origin on; equal if they miss."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    slab = (box[:, None] - origins) / safe  # [2, R, 3]
    enter, leave = slab.amin(0).amax(-1).clamp_min(0.0), slab.amax(0).amin(-1)
    return enter, torch.maximum(leave, enter)


@torch.no_grad()
def _occupied_stretches(
    field: SkippingField, origins: Tensor, directions: Tensor, step: float, offset: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Ray numbers [P], ascending, and distances [P], ascending in each ray, of all stretches in occupied cells."""
    enter, leave = box_interval(field.box, origins, directions)
    count = int(((leave - enter).amax() / step).ceil()) if len(origins) else 0
    order = torch.arange(count, device=origins.device)[None] + torch.as_tensor(offset, device=origins.device)[..., None]
    distance = enter[:, None] + step * order.to(origins)  # [R, S]
    ray, column = (distance < leave[:, None]).nonzero(as_tuple=True)
    distance = distance[ray, column]
    full = field.occupied(origins[ray] + distance[:, None] * directions[ray])
    return ray[full], distance[full]


def _slots(ray: Tensor, rays: int) -> tuple[Tensor, int]:
    """The place [P] of every stretch within its ray (numbers ascending), and the longest ray's count, at least 1."""
    count = torch.bincount(ray, minlength=rays)
    first = count.cumsum(0) - count
    return torch.arange(len(ray), device=ray.device) - first[ray], max(1, int(count.amax()) if rays else 0)


def _reached(optical_depth: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Which stretches [P] the light still reaches: those before which at least OPAQUE of the ray is left."""
    slot, longest = _slots(ray, rays)
    table = optical_depth.new_zeros(rays, longest).index_put((ray, slot), optical_depth)
    before = table.cumsum(-1)[ray, slot] - optical_depth
    return before <= -math.log(OPAQUE)


def render_solids(solids: Solids, origins: Tensor, directions: Tensor) -> Tensor:
    """Colours [R, 3] of rays [R, 3] through disjoint homogeneous solids: exact absorption, colour as at the entry."""
    enter, leave = solids.intervals(origins, directions)  # [R, K]
    colour = solids.texture(origins[:, None] + enter[..., None] * directions[:, None])
    order = enter.argsort(dim=-1, stable=True)
    optical_depth = (solids.density * (leave - enter)).gather(1, order)
    colour = colour.gather(1, order[..., None].expand_as(colour))
    return composite(optical_depth, colour, origins.new_tensor(BACKGROUND))


def render_views(camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 2) -> Tensor:
    """Pictures [N, 3, H, W] of the built-in object, float32 in steps of 1/255, from cameras [N, 4, 4].

    Every pixel is the mean of supersample^2 rays. Each view is rendered by itself, so that it does not depend on the
    views beside it.
    """
    solids = chair()
    fine = Intrinsics(
        fx=supersample * intrinsics.fx,
        fy=supersample * intrinsics.fy,
        cx=supersample * intrinsics.cx,
        cy=supersample * intrinsics.cy,
        width=supersample * intrinsics.width,
        height=supersample * intrinsics.height,
    )
    pictures = []
    for pose in camera_to_world:
        origins, directions = camera_rays(pose, fine)
        colour = render_solids(solids, origins.reshape(-1, 3).float(), directions.reshape(-1, 3).float())
        picture = colour.reshape(fine.height, fine.width, 3).permute(2, 0, 1)[None]
        picture = torch.nn.functional.avg_pool2d(picture, supersample)[0]
        pictures.append((picture * 255.0).round() / 255.0)
    return torch.stack(pictures)
