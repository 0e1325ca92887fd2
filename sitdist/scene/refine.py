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

from sitdist.geometry.camera import orbit
from sitdist.geometry.least_squares import levenberg_marquardt

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
    before = compared.cost(estimate, compared.all_rows)
    place, cost, settled = estimate.clone(), before.clone(), torch.zeros_like(before, dtype=torch.bool)
    for number, offset in enumerate(((0.0, 0.0, 0.0), *OTHER_STARTS * ROUNDS)):
        rows = compared.all_rows if number == 0 else (cost > enough**2 * pixels).nonzero()[:, 0]
        if len(rows) == 0:
            break
        found, there = place[rows] + estimate.new_tensor(offset), settled[rows]
        for stage in stages:
            found, there = compared.fitted(found, rows, stage)
        reached = compared.cost(found, rows)
        better = reached < cost[rows]
        taken = rows[better]
        place[taken], cost[taken], settled[taken] = found[better], reached[better], there[better]
    return Refined(camera_of(place), (cost / pixels).sqrt(), (before / pixels).sqrt(), settled)


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


def camera_of(place: Tensor) -> Tensor:
    """The inverse of `orbit_of`, for cameras [B, 4, 4] that look at the origin upright."""
    log_radius, azimuth, elevation = place.unbind(dim=1)
    return orbit(azimuth.rad2deg(), elevation.rad2deg(), log_radius.exp())


class _Compared:
    """Pictures beside those that `render` makes of them."""

    def __init__(self, render: Render, images: Tensor) -> None:
        self.render, self.images = render, images
        self.all_rows = torch.arange(len(images), device=images.device)

    def error(self, place: Tensor, rows: Tensor, shrink: int = 1) -> Tensor:
        """Differences of all pixels [n, P] float64 of views `rows` [n], shrunk."""
        target = self.images[rows]
        if shrink > 1:
            target = torch.nn.functional.avg_pool2d(target, shrink)
        return (self.render(camera_of(place), rows, shrink) - target).flatten(1).double()

    def cost(self, place: Tensor, rows: Tensor) -> Tensor:
        """The sum [n] of their squares at full size."""
        return self.error(place, rows).square().sum(dim=1)

    def jacobian(self, place: Tensor, rows: Tensor, shrink: int, difference: float) -> Tensor:
        """Derivatives [n, P, 3] of the differences, by central differences."""
        columns = []
        for direction in difference * torch.eye(3, dtype=torch.float64, device=place.device):
            ahead, behind = (self.error(place + sign * direction, rows, shrink) for sign in (1.0, -1.0))
            columns.append((ahead - behind) / (2.0 * difference))
        return torch.stack(columns, dim=-1)

    def fitted(self, place: Tensor, rows: Tensor, stage: Stage) -> tuple[Tensor, Tensor]:
        """Places [n, 3] of the views `rows` after the stage, and whether no step moves them on [n]."""
        shrink = max(1, min(self.images.shape[-2:]) // stage.pixels)
        return levenberg_marquardt(
            place,
            lambda now, of: self.error(now, rows[of], shrink),
            lambda now, of: self.jacobian(now, rows[of], shrink, stage.difference),
            stage.steps,
            LARGEST_STEP,
            SMALLEST_STEP,
        )
