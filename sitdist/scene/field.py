"""The built-in object: an asymmetric, textured chair of homogeneous solids, as a radiance field.

Its sides all differ (one armrest, four leg colours, a ball on the seat, a striped back with a plain rear), so that no
two cameras see the same picture. It fits the ball of radius 1 about the origin (the upper corners of its back reach
0.985), so that a camera at radius 1 is outside; +z is up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DENSITY = 80.0  # per unit of length: opaque within a few hundredths
SCALE = 0.9  # from the units of the table below to the scene's

# centre, half size, colour, second colour, texture frequency along x, y, z; a negative first half size: an ellipsoid
_CHAIR = [
    ((0.00, 0.05, -0.02), (0.42, 0.42, 0.05), (0.85, 0.20, 0.15), (0.40, 0.05, 0.10), (9.0, 9.0, 0.0)),  # seat
    ((0.00, -0.42, 0.45), (0.42, 0.05, 0.42), (0.15, 0.45, 0.80), (0.90, 0.90, 0.55), (0.0, 0.0, 14.0)),  # back, front
    ((0.00, -0.49, 0.45), (0.42, 0.02, 0.42), (0.20, 0.60, 0.30), (0.10, 0.35, 0.20), (11.0, 0.0, 0.0)),  # back, rear
    ((0.36, 0.41, -0.42), (0.05, 0.05, 0.35), (0.90, 0.75, 0.10), (0.60, 0.45, 0.05), (0.0, 0.0, 12.0)),  # legs
    ((-0.36, 0.41, -0.42), (0.05, 0.05, 0.35), (0.20, 0.25, 0.75), (0.05, 0.05, 0.35), (0.0, 0.0, 12.0)),
    ((0.36, -0.31, -0.42), (0.05, 0.05, 0.35), (0.55, 0.30, 0.10), (0.30, 0.15, 0.05), (0.0, 0.0, 12.0)),
    ((-0.36, -0.31, -0.42), (0.05, 0.05, 0.35), (0.10, 0.55, 0.50), (0.05, 0.30, 0.25), (0.0, 0.0, 12.0)),
    ((0.47, 0.02, 0.30), (0.05, 0.37, 0.04), (0.65, 0.25, 0.70), (0.35, 0.10, 0.40), (0.0, 10.0, 0.0)),  # armrest
    ((0.47, 0.34, 0.12), (0.04, 0.04, 0.14), (0.45, 0.20, 0.50), (0.45, 0.20, 0.50), (0.0, 0.0, 0.0)),  # its post
    ((-0.14, 0.16, 0.18), (-0.15, 0.15, 0.15), (0.95, 0.55, 0.10), (0.99, 0.85, 0.60), (16.0, 0.0, 16.0)),  # ball
    ((-0.30, -0.359, 0.80), (0.12, 0.011, 0.06), (0.10, 0.10, 0.10), (0.10, 0.10, 0.10), (0.0, 0.0, 0.0)),  # label
    ((0.00, 0.41, -0.60), (0.31, 0.03, 0.03), (0.30, 0.30, 0.35), (0.75, 0.75, 0.80), (13.0, 0.0, 0.0)),  # front bar
]


@dataclass(frozen=True)
class Solids:
    """K disjoint convex solids of one density: centre, half size, two colours and texture frequencies, [K, 3] each.

    `round` [K] says which are ellipsoids; the others are axis-aligned boxes.
    """

    centre: Tensor
    half: Tensor
    colour: Tensor
    second_colour: Tensor
    frequency: Tensor
    round: Tensor
    density: float = DENSITY

    def intervals(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Distances [R, K] at which rays [R, 3] enter and leave every solid; equal where they miss it."""
        origins = (origins[:, None] - self.centre) / self.half  # [R, K, 3]: every solid becomes a unit cube or ball
        directions = directions[:, None] / self.half
        safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
        slab = torch.stack([(-1.0 - origins) / safe, (1.0 - origins) / safe])
        enter_box, leave_box = slab.amin(0).amax(-1), slab.amax(0).amin(-1)
        a, b, c = directions.square().sum(-1), (origins * directions).sum(-1), origins.square().sum(-1) - 1.0
        root = (b.square() - a * c).clamp_min(0.0).sqrt()
        enter = torch.where(self.round, (-b - root) / a, enter_box).clamp_min(0.0)
        leave = torch.where(self.round, (-b + root) / a, leave_box)
        return enter, torch.maximum(leave, enter)

    def texture(self, points: Tensor) -> Tensor:
        """Colours [R, K, 3] of the solids at points [R, K, 3]: soft waves between the two, lighter towards the top."""
        waves = torch.cos(points * self.frequency).prod(-1, keepdim=True)  # [R, K, 1]
        mix = 0.5 + 0.5 * torch.tanh(3.0 * waves)
        light = 0.85 + 0.15 * points[..., 2:3] + 0.08 * points[..., 0:1]
        return ((mix * self.colour + (1.0 - mix) * self.second_colour) * light).clamp(0.0, 1.0)


def chair(dtype: torch.dtype = torch.float32) -> Solids:
    """The built-in chair."""
    centre, half, colour, second, frequency = (
        torch.tensor(values, dtype=dtype) for values in zip(*_CHAIR, strict=True)
    )
    return Solids(SCALE * centre, SCALE * half.abs(), colour, second, frequency / SCALE, half[:, 0] < 0)
