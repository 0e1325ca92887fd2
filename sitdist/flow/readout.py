"""From the sixteen entries of an estimated pose, which make no rigid one, to the camera that fits them best.

`svd` takes the nearest rotation and the translation as it is. `weighted` fits the rotation with each entry weighted by
one over its variance. `look_at` fits azimuth, elevation and radius to all twelve entries, of a camera that looks at the
origin upright: three numbers in the place of six, so that less of the noise is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow.names import Readout
from sitdist.geometry.packing import PoseStatistics, entries
from sitdist.geometry.pose import project_to_so3

READOUTS = get_args(Readout)
ITERATIONS = 30
LEAST_SPREAD = 1e-6  # of a standardized entry: one that is constant is known, but not without end


def read_camera(packed_pose: Tensor, spread: Tensor, statistics: PoseStatistics, readout: str = "svd") -> Tensor:
    """camera_to_world [B, 4, 4] float64 of packed poses [B, 4, 4] whose entries have standard errors `spread`."""
    if readout not in READOUTS:
        raise ConfigError(f"readout '{readout}': unknown; choose one of {', '.join(READOUTS)}")
    matrix = entries(packed_pose, statistics)[..., :3, :]  # [B, 3, 4]
    deviation = statistics.std.to(matrix)[:3]
    if readout == "look_at":  # the network errs alike in all standardized entries
        return look_at_fit(matrix, deviation.expand_as(matrix))
    rotation = project_to_so3(matrix[..., :3])
    if readout == "weighted":
        error = deviation[:, :3] * spread.to(matrix)[:, :3, :3].clamp_min(LEAST_SPREAD)
        rotation = rotation_fit(matrix[..., :3], error, rotation)
    return _pose(rotation, matrix[..., 3])


def rotation_fit(matrix: Tensor, deviation: Tensor, start: Tensor) -> Tensor:
    """The rotation [B, 3, 3] that minimizes the sum over entries of ((R - matrix) / deviation)^2, near `start`.

    With equal deviations that is `project_to_so3`; with others it has no closed form, and is iterated.
    """
    generators = torch.zeros(3, 3, 3, dtype=matrix.dtype, device=matrix.device)  # of turns about x, y, z
    for axis in range(3):
        generators[axis, (axis + 2) % 3, (axis + 1) % 3] = 1.0
        generators[axis, (axis + 1) % 3, (axis + 2) % 3] = -1.0

    def linearize(rotation: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.einsum("bij,kjl->bilk", rotation, generators) / deviation[..., None]
        return ((rotation - matrix) / deviation).flatten(1), turned.flatten(1, 2)

    def move(rotation: Tensor, angles: Tensor) -> Tensor:
        return rotation @ torch.linalg.matrix_exp(torch.einsum("bk,kij->bij", angles, generators))

    return project_to_so3(_least_squares(start, linearize, move))


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

    def linearize(parameters: Tensor) -> tuple[Tensor, Tensor]:
        pose, by_parameter = _look_at(parameters)
        return ((pose - matrix) / deviation).flatten(1), (by_parameter / deviation[..., None]).flatten(1, 2)

    found = _least_squares(start, linearize, lambda parameters, step: parameters + step)
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


def _least_squares(
    state: Tensor, linearize: Callable[[Tensor], tuple[Tensor, Tensor]], move: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Levenberg and Marquardt's iteration for B small problems at once; the cost of none of them ever grows.

    `linearize` gives residuals [B, n] and Jacobian [B, n, p] at a state [B, ...], `move` the state after steps [B, p].
    """
    residual, jacobian = linearize(state)
    cost, damping = residual.square().sum(-1), torch.full_like(residual[:, 0], 1e-3)
    for _ in range(ITERATIONS):
        normal = jacobian.mT @ jacobian
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        damped = normal + torch.diag_embed(damping[:, None] * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True))
        step = -torch.linalg.solve(damped, jacobian.mT @ residual[..., None])[..., 0]
        trial = move(state, step)
        new_residual, new_jacobian = linearize(trial)
        new_cost = new_residual.square().sum(-1)
        better = new_cost < cost
        state = torch.where(better.reshape(-1, *[1] * (state.ndim - 1)), trial, state)
        residual = torch.where(better[:, None], new_residual, residual)
        jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
        cost, damping = torch.where(better, new_cost, cost), torch.where(better, 0.1 * damping, 10.0 * damping)
        damping = damping.clamp(1e-9, 1e9)
    return state


def _pose(rotation: Tensor, position: Tensor) -> Tensor:
    pose = torch.zeros(len(rotation), 4, 4, dtype=rotation.dtype, device=rotation.device)
    pose[:, :3, :3], pose[:, :3, 3], pose[:, 3, 3] = rotation, position, 1.0
    return pose


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp_min(1e-12)
