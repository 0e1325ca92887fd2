"""Volume rendering: colour along a ray is what every stretch emits times what the stretches before it let through.

One compositing rule serves solids, whose stretches are known in closed form, and voxel fields, by ray marching.
Source: Max, "Optical models for direct volume rendering", 1995; the quadrature of Mildenhall et al., "NeRF", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sitdist.geometry.camera import Intrinsics, camera_rays
from sitdist.io.files import require_memory
from sitdist.scene.field import Solids

BACKGROUND = (0.5, 0.5, 0.5)
OPAQUE = 1e-3  # a ray of which less than this is left is not followed any further
NEAR = 2  # cells to every side: what a look at one point says of those around it
RAYS_AT_ONCE = 16384


class SkippingField(Protocol):
    """A radiance field within a box that knows where it is empty."""

    box: Tensor  # [2, 3], lower and upper corner

    @property
    def edge(self) -> float:
        """The shortest edge of a cell."""

    def occupied(self, x: Tensor, y: Tensor, z: Tensor, near: bool = False) -> Tensor:
        """Which points, by coordinates [...], are in cells that are not empty, or with `near` have one nearby."""

    def density(self, points: Tensor) -> Tensor:
        """Density [P] at points [P, 3]."""

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and colour [P, 3] at points [P, 3], seen along unit directions [P, 3]."""


class Rendered(NamedTuple):
    """Rendered rays or pixels: the light of the scene, [..., 3], and the transmittance to the background, [...].

    depth [...]: the mean distance from the camera of what is seen, times its opacity.
    """

    light: Tensor
    through: Tensor
    depth: Tensor

    def planes(self) -> Tensor:
        """Light, then transmittance, of pixels: a view without its background, [4, H, W]."""
        return torch.cat([self.light, self.through[..., None]], dim=-1).permute(2, 0, 1)

    def on(self, background: Tensor) -> Tensor:
        """Colours [..., 3] composited on a background [3]."""
        return self.light + self.through[..., None] * background


def composite(optical_depth: Tensor, colour: Tensor, distance: Tensor) -> Rendered:
    """Rays with stretches in order: optical depth [R, K], colour [R, K, 3], distance [R, K]."""
    through = torch.exp(-optical_depth.cumsum(-1))
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    weight = before - through
    return Rendered((weight[..., None] * colour).sum(-2), through[:, -1], (weight * distance).sum(-1))


def march_occupied(
    field: SkippingField, origins: Tensor, directions: Tensor, step: float, offset: Tensor | float = 0.5
) -> Rendered:
    """Rays [R, 3] through a field that knows where it is empty, in stretches of length `step`.

    Every stretch is as at one point of it: at `offset` of its length, a number or one for each ray, [R]. Stretches in
    empty cells and those that no light reaches (below OPAQUE) are left out; gradients flow through all others.
    """
    ray, distance = _occupied_stretches(field, origins, directions, step, offset)
    with torch.no_grad():
        points = origins.index_select(0, ray) + distance[:, None] * directions.index_select(0, ray)
        optical_depth = field.density(points) * step
        reached = (_depth_before(optical_depth, ray, len(origins)) <= -math.log(OPAQUE)).nonzero()[:, 0]
        ray, distance, points = ray[reached], distance[reached], points.index_select(0, reached)
    density, colour = field.radiance(points, directions.index_select(0, ray))
    optical_depth = density * step
    before = _depth_before(optical_depth, ray, len(origins))
    weight = torch.exp(-before) - torch.exp(-before - optical_depth)
    light = torch.zeros_like(origins).index_add(0, ray, weight[:, None] * colour)
    through = torch.exp(-torch.zeros_like(origins[:, 0]).index_add(0, ray, optical_depth))
    with torch.no_grad():
        depth = torch.zeros_like(through).index_add(0, ray, weight * distance)
    return Rendered(light, through, depth)


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
    """Ray numbers [P], ascending, and distances [P], ascending in each ray, of all stretches in occupied cells.

    They are looked for in groups: one of which no occupied cell is NEAR its middle holds none.
    """
    enter, leave = box_interval(field.box, origins, directions)
    rays = (leave > enter).nonzero()[:, 0]
    begin, end = enter[rays, None], leave[rays, None]
    offsets = torch.as_tensor(offset, dtype=enter.dtype, device=enter.device).expand(len(enter))
    begin = begin + step * offsets[rays, None]
    starts, slopes = origins[rays].T[..., None].contiguous(), directions[rays].T[..., None].contiguous()  # [3, R, 1]

    size = 1 + int(2 * NEAR * field.edge / step)  # so that a group's ends are NEAR its middle
    groups = int(((end - begin).amax() / (size * step)).floor()) + 1 if len(rays) else 0
    first = step * size * torch.arange(groups, device=enter.device)
    x, y, z = starts + (begin + (first + 0.5 * step * (size - 1))) * slopes  # [R, groups] each, of the middles
    kept = field.occupied(x, y, z, near=True) & (begin + first < end)
    row, group = kept.nonzero(as_tuple=True)
    distance = (begin[row] + first[group, None]) + step * torch.arange(size, device=enter.device)  # [K, size]
    kept = field.occupied(*(starts[:, row] + distance * slopes[:, row])) & (distance < end[row])
    row = rays[row].repeat_interleave(size)
    full = kept.flatten().nonzero()[:, 0]
    return row[full], distance.flatten()[full]


def _depth_before(optical_depth: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Optical depth [P] of what lies before every stretch of its ray; ray numbers [P] ascend."""
    depth = optical_depth.double().cumsum(0) - optical_depth  # of all rays before, too
    count = torch.bincount(ray, minlength=rays)
    first = (count.cumsum(0) - count)[ray]  # the first stretch of every stretch's ray
    return (depth - depth[first]).to(optical_depth)


def render_solids(solids: Solids, origins: Tensor, directions: Tensor) -> Rendered:
    """Rays [R, 3] through disjoint homogeneous solids: exact absorption, colour as at the entry."""
    enter, leave = solids.intervals(origins, directions)  # [R, K]
    colour = solids.texture(origins[:, None] + enter[..., None] * directions[:, None])
    order = enter.argsort(dim=-1, stable=True)
    optical_depth = (solids.density * (leave - enter)).gather(1, order)
    return composite(optical_depth, colour.gather(1, order[..., None].expand_as(colour)), enter.gather(1, order))


def picture(
    render: Callable[[Tensor, Tensor], Rendered], camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int
) -> Rendered:
    """What a camera [4, 4] sees, [H, W, 3], [H, W] and [H, W], by `render(origins, directions)` of rays [R, 3].

    Every pixel is the mean of supersample^2 rays; RAYS_AT_ONCE are rendered together, however large the picture is.
    """
    fine = intrinsics.scaled(supersample)
    what = f"a picture of {intrinsics.width}x{intrinsics.height} pixels of {supersample}^2 rays"
    require_memory(160 * fine.width * fine.height, what, "make it smaller, or supersample less")
    origins, directions = (rays.reshape(-1, 3).float() for rays in camera_rays(camera_to_world, fine))
    parts = [render(*rays) for rays in zip(origins.split(RAYS_AT_ONCE), directions.split(RAYS_AT_ONCE), strict=True)]
    rays = torch.cat([torch.cat([part.light, part.through[:, None], part.depth[:, None]], 1) for part in parts])
    planes = rays.T.reshape(1, 5, fine.height, fine.width)
    pixels = torch.nn.functional.avg_pool2d(planes, supersample)[0].permute(1, 2, 0)
    return Rendered(pixels[..., :3], pixels[..., 3], pixels[..., 4])
