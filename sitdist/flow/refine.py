"""Refine the pose of a picture by rendering and comparing: damped Gauss-Newton on cameras that look at the origin.

Three numbers a picture (logarithm of the radius, azimuth, elevation): at a few dozen pixels a small turn and a sideways
shift of a free camera nearly cancel. The renderer is the scene's own radiance field, fitted from training views alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sitdist.geometry.camera import look_at

Render = Callable[[Tensor], Tensor]


class Stage(NamedTuple):
    """`steps` Gauss-Newton steps on pictures averaged over `blur` pixels (odd), differences taken over `difference`."""

    blur: int
    steps: int
    difference: float


COARSE_TO_FINE = (Stage(7, 5, 0.02), Stage(1, 7, 0.005))
LARGEST_STEP = 0.3  # in radians, and in the logarithm of the radius


@dataclass(frozen=True)
class Refined:
    """camera_to_world [B, 4, 4] float64, the root mean square error of its pictures [B], and of those at the start."""

    camera_to_world: Tensor
    residual: Tensor
    residual_before: Tensor


@torch.no_grad()
def refine_look_at(
    render: Render, images: Tensor, camera_to_world: Tensor, stages: Sequence[Stage] = COARSE_TO_FINE
) -> Refined:
    """Poses near `camera_to_world` [B, 4, 4] whose pictures, by `render`, are nearest to `images` [B, 3, H, W].

    `render` takes cameras [B, 4, 4] to pictures [B, 3, H, W]. All cameras look at the origin upright. A step that does
    not lower a picture's error is not taken; a picture that no stage improves keeps the orbit of its start.
    """
    start = orbit_of(camera_to_world)  # [B, 3]
    before = _error(render, images, start, 1)[1]
    orbit = start
    for stage in stages:
        orbit = _gauss_newton(render, images, orbit, stage)
    after = _error(render, images, orbit, 1)[1]
    better = after < before
    orbit = torch.where(better[:, None], orbit, start)
    pixels = images[0].numel()
    return Refined(camera_of(orbit), (torch.minimum(after, before) / pixels).sqrt(), (before / pixels).sqrt())


def orbit_of(camera_to_world: Tensor) -> Tensor:
    """Logarithm of the radius, azimuth and elevation (radians) [B, 3] of cameras [B, 4, 4].

    The direction is that between where a camera is and where it looks from, so that both of an estimate's halves count.
    """
    position = camera_to_world[:, :3, 3].double()
    radius = position.norm(dim=1)
    direction = position / radius[:, None] + camera_to_world[:, :3, 2].double()
    direction = direction / direction.norm(dim=1, keepdim=True)
    azimuth, elevation = torch.atan2(direction[:, 1], direction[:, 0]), direction[:, 2].clamp(-1.0, 1.0).asin()
    return torch.stack([radius.log(), azimuth, elevation], dim=1)


def camera_of(orbit: Tensor) -> Tensor:
    """The inverse of `orbit_of`, for cameras [B, 4, 4] that look at the origin upright."""
    radius, azimuth, elevation = orbit[:, 0].exp(), orbit[:, 1], orbit[:, 2]
    flat = radius * elevation.cos()
    return look_at(torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), radius * elevation.sin()], dim=1))


def _gauss_newton(render: Render, images: Tensor, orbit: Tensor, stage: Stage) -> Tensor:
    """Levenberg's damping, by picture: a fifth after a step that helped, ten times as much after one that did not."""
    damping = torch.full((len(orbit),), 1e-2, dtype=torch.float64, device=orbit.device)
    error, cost = _error(render, images, orbit, stage.blur)
    for _ in range(stage.steps):
        jacobian = _jacobian(render, images, orbit, stage)  # [B, P, 3]
        normal = jacobian.mT @ jacobian
        damped = normal + torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-9)
        step = -torch.linalg.solve(damped, jacobian.mT @ error[..., None])[..., 0]
        moved = orbit + step.clamp(-LARGEST_STEP, LARGEST_STEP)
        new_error, new_cost = _error(render, images, moved, stage.blur)
        better = new_cost < cost
        orbit = torch.where(better[:, None], moved, orbit)
        error, cost = torch.where(better[:, None], new_error, error), torch.where(better, new_cost, cost)
        damping = torch.where(better, damping * 0.2, damping * 10.0)
    return orbit


def _jacobian(render: Render, images: Tensor, orbit: Tensor, stage: Stage) -> Tensor:
    columns = []
    for direction in stage.difference * torch.eye(3, dtype=torch.float64, device=orbit.device):
        ahead, behind = (_error(render, images, orbit + sign * direction, stage.blur)[0] for sign in (1.0, -1.0))
        columns.append((ahead - behind) / (2.0 * stage.difference))
    return torch.stack(columns, dim=-1)


def _error(render: Render, images: Tensor, orbit: Tensor, blur: int) -> tuple[Tensor, Tensor]:
    """Differences of all pixels [B, P] float64 after averaging over `blur` pixels, and their squares' sum [B]."""
    difference = render(camera_of(orbit)) - images
    if blur > 1:
        difference = torch.nn.functional.avg_pool2d(difference, blur, stride=1, padding=blur // 2)
    flat = difference.flatten(1).double()
    return flat, flat.square().sum(dim=1)
