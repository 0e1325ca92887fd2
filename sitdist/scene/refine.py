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

Render = Callable[[Tensor, Tensor, int], Tensor]


class Stage(NamedTuple):
    """At most `steps` Gauss-Newton steps on pictures of about `pixels` a side, differences taken over `difference`."""

    pixels: int
    steps: int
    difference: float


COARSE_TO_FINE = (Stage(16, 6, 0.02), Stage(64, 8, 0.005))
LARGEST_STEP = 0.3  # in radians, and in the logarithm of the radius
ROUNDS = 2  # through the other starts
SMALLEST_STEP = 1e-4  # below it a picture is done
LARGEST_DAMPING = 1e3  # above it no step helps, and a picture is done too
# Where else to begin, from the best so far: offsets of the logarithm of the radius, azimuth and elevation (radians).
OTHER_STARTS = ((0.2, 0.0, 0.0), (-0.2, 0.0, 0.0), (0.0, 0.2, 0.0), (0.0, -0.2, 0.0), (0.0, 0.0, 0.2), (0.0, 0.0, -0.2))


@dataclass(frozen=True)
class Refined:
    """camera_to_world [B, 4, 4] float64, the root mean square error of its pictures [B], and of those at the start.

    settled [B]: it was moved, and no step moves it on.
    """

    camera_to_world: Tensor
    residual: Tensor
    residual_before: Tensor
    settled: Tensor


@torch.no_grad()
def refine_look_at(
    render: Render,
    images: Tensor,
    camera_to_world: Tensor,
    stages: Sequence[Stage] = COARSE_TO_FINE,
    enough: float = 0.0,
) -> Refined:
    """Poses near `camera_to_world` [B, 4, 4] whose pictures, by `render`, are nearest to `images` [B, 3, H, W].

    `render(cameras [n, 4, 4], rows [n], shrink)` gives the pictures [n, 3, H // shrink, W // shrink] of cameras that
    stand for the views `rows`. All cameras look at the origin upright. Pictures whose root mean square error stays
    above `enough` are tried again from OTHER_STARTS, ROUNDS times, and the best is kept. A step that does not lower a
    picture's error is not taken; a picture that nothing improves keeps the orbit of its estimate.
    """
    compared, pixels = _Compared(render, images), images[0].numel()
    estimate = orbit_of(camera_to_world)  # [B, 3]
    before = compared.error(estimate, compared.all_rows, 1)[1]
    orbit, cost, settled = estimate.clone(), before.clone(), torch.zeros_like(before, dtype=torch.bool)
    for number, offset in enumerate(((0.0, 0.0, 0.0), *OTHER_STARTS * ROUNDS)):
        rows = compared.all_rows if number == 0 else (cost > enough**2 * pixels).nonzero()[:, 0]
        if len(rows) == 0:
            break
        found, there = orbit[rows] + estimate.new_tensor(offset), settled[rows]
        for stage in stages:
            found, there = _gauss_newton(compared, found, rows, stage)
        reached = compared.error(found, rows, 1)[1]
        better = reached < cost[rows]
        taken = rows[better]
        orbit[taken], cost[taken], settled[taken] = found[better], reached[better], there[better]
    return Refined(camera_of(orbit), (cost / pixels).sqrt(), (before / pixels).sqrt(), settled)


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


class _Compared:
    """Pictures beside those that `render` makes of them."""

    def __init__(self, render: Render, images: Tensor) -> None:
        self.render, self.images = render, images
        self.all_rows = torch.arange(len(images), device=images.device)

    def error(self, orbit: Tensor, rows: Tensor, shrink: int) -> tuple[Tensor, Tensor]:
        """Differences of all pixels [n, P] float64 of views `rows` [n], shrunk, and their squares' sum [n]."""
        target = self.images[rows]
        if shrink > 1:
            target = torch.nn.functional.avg_pool2d(target, shrink)
        flat = (self.render(camera_of(orbit), rows, shrink) - target).flatten(1).double()
        return flat, flat.square().sum(dim=1)

    def jacobian(self, orbit: Tensor, rows: Tensor, shrink: int, difference: float) -> Tensor:
        """Derivatives [n, P, 3] of the differences by central differences."""
        columns = []
        for direction in difference * torch.eye(3, dtype=torch.float64, device=orbit.device):
            ahead, behind = (self.error(orbit + sign * direction, rows, shrink)[0] for sign in (1.0, -1.0))
            columns.append((ahead - behind) / (2.0 * difference))
        return torch.stack(columns, dim=-1)

    def shrink(self, stage: Stage) -> int:
        """By how much a stage's pictures are smaller than these."""
        return max(1, min(self.images.shape[-2:]) // stage.pixels)


def _gauss_newton(compared: _Compared, orbit: Tensor, rows: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
    """Orbits [n, 3] of the views `rows` after the stage, and whether no step moves them on [n].

    Levenberg's damping, by picture: a fifth after a step that helped, ten times as much after one that did not.
    """
    orbit, shrink = orbit.clone(), compared.shrink(stage)
    damping = torch.full((len(rows),), 1e-2, dtype=torch.float64, device=orbit.device)
    error, cost = compared.error(orbit, rows, shrink)
    active = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(stage.steps):
        on = active.nonzero()[:, 0]
        if len(on) == 0:
            break
        jacobian = compared.jacobian(orbit[on], rows[on], shrink, stage.difference)  # [m, P, 3]
        normal = jacobian.mT @ jacobian
        damped = normal + torch.diag_embed(damping[on, None] * normal.diagonal(dim1=1, dim2=2) + 1e-9)
        step = -torch.linalg.solve(damped, jacobian.mT @ error[on, :, None])[..., 0]
        moved = orbit[on] + step.clamp(-LARGEST_STEP, LARGEST_STEP)
        new_error, new_cost = compared.error(moved, rows[on], shrink)
        better = new_cost < cost[on]
        taken = on[better]
        orbit[taken], error[taken], cost[taken] = moved[better], new_error[better], new_cost[better]
        damping[on] *= torch.where(better, 0.2, 10.0).double()
        active[on] = (step.abs().amax(dim=1) >= SMALLEST_STEP) & (damping[on] <= LARGEST_DAMPING)
    return orbit, ~active
