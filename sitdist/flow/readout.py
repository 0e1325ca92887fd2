"""From the sixteen entries of an estimated pose, which make no rigid one, to the camera that fits them best.

`svd` takes the nearest rotation and the translation as it is. `look_at` fits azimuth, elevation and radius to all
twelve entries, of a camera that looks at the origin upright: three numbers instead of six, so that less noise is left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sitdist import checks
from sitdist.flow.choices import READOUTS
from sitdist.geometry.least_squares import levenberg_marquardt
from sitdist.geometry.packing import PoseStatistics, entries
from sitdist.geometry.pose import project_to_so3

ITERATIONS = 30


def read_camera(packed_pose: Tensor, statistics: PoseStatistics, readout: str = "svd") -> Tensor:
    """camera_to_world [B, 4, 4] float64 of packed poses [B, 4, 4]."""
    checks.choice("readout", readout, READOUTS)
    matrix = entries(packed_pose, statistics)[..., :3, :]  # [B, 3, 4]
    if readout == "look_at":  # the network errs alike in all standardized entries
        return look_at_fit(matrix, statistics.std.to(matrix)[:3].expand_as(matrix))
    return _pose(project_to_so3(matrix[..., :3]), matrix[..., 3])


def look_at_fit(matrix: Tensor, deviation: Tensor) -> Tensor:
    """Upright camera_to_world [B, 4, 4] looking at the origin: the least sum of ((pose - matrix) / deviation)^2.

    `matrix` and `deviation` are the upper three rows, [B, 3, 4].
    """
    position = matrix[..., 3]
    direction = _unit(_unit(position) + _unit(matrix[..., 2]))
    start = torch.stack(
        [
            torch.atan2(direction[:, 1], direction[:, 0]),
            torch.asin(direction[:, 2].clamp(-1.0, 1.0)),
            (position * direction).sum(-1).clamp_min(1e-3),
        ],
        dim=-1,
    )

    def residual(parameters: Tensor, rows: Tensor) -> Tensor:
        return ((_look_at(parameters)[0] - matrix[rows]) / deviation[rows]).flatten(1)

    def jacobian(parameters: Tensor, rows: Tensor) -> Tensor:
        return (_look_at(parameters)[1] / deviation[rows][..., None]).flatten(1, 2)

    found, _ = levenberg_marquardt(start, residual, jacobian, ITERATIONS)
    azimuth, elevation, radius = found.unbind(-1)
    upright = torch.stack([azimuth, elevation.clamp(-0.5 * math.pi, 0.5 * math.pi), radius], dim=-1)
    pose = _look_at(upright)[0]
    return _pose(pose[..., :3], pose[..., 3])


def _look_at(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The upper rows [B, 3, 4] of cameras at azimuth, elevation, radius [B, 3], and their derivatives [B, 3, 4, 3]."""
    azimuth, elevation, radius = parameters.unbind(-1)
    (sin_a, cos_a), (sin_e, cos_e) = ((angle.sin(), angle.cos()) for angle in (azimuth, elevation))
    zero = torch.zeros_like(radius)

    def rows(right: Tensor, up: Tensor, backward: Tensor, position: Tensor) -> Tensor:
        return torch.stack([right, up, backward, position], dim=-1)

    ahead = torch.stack([cos_a, sin_a, zero], dim=-1)  # level, away from the origin
    right = torch.stack([-sin_a, cos_a, zero], dim=-1)
    vertical = torch.stack([zero, zero, torch.ones_like(zero)], dim=-1)
    backward = cos_e[:, None] * ahead + sin_e[:, None] * vertical
    up = cos_e[:, None] * vertical - sin_e[:, None] * ahead
    none = torch.zeros_like(right)
    by_azimuth = rows(-ahead, -sin_e[:, None] * right, cos_e[:, None] * right, (radius * cos_e)[:, None] * right)
    by_elevation = rows(none, -backward, up, radius[:, None] * up)
    by_radius = rows(none, none, none, backward)
    return rows(right, up, backward, radius[:, None] * backward), torch.stack([by_azimuth, by_elevation, by_radius], -1)


def _pose(rotation: Tensor, position: Tensor) -> Tensor:
    pose = torch.zeros(len(rotation), 4, 4, dtype=rotation.dtype, device=rotation.device)
    pose[:, :3, :3], pose[:, :3, 3], pose[:, 3, 3] = rotation, position, 1.0
    return pose


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-12)
