"""Nonlinear least squares: Levenberg's and Marquardt's damped Gauss-Newton steps, for many small problems at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_DAMPING = 1e3  # above it no step helps


def levenberg_marquardt(
    start: Tensor,
    residual: Callable[[Tensor, Tensor], Tensor],
    jacobian: Callable[[Tensor, Tensor], Tensor],
    iterations: int,
    largest_step: float = math.inf,
    smallest_step: float = 1e-10,
) -> tuple[Tensor, Tensor]:
    """Parameters [B, p] that lower the squared residuals of B problems from `start` [B, p], and whether they settled.

    `residual(parameters [n, p], rows [n])` gives the residuals [n, m] of the problems `rows`, `jacobian` their
    derivatives [n, m, p]; both float64. The cost of a problem never grows: its damping falls to a fifth after a step
    that helps and rises tenfold after one that does not, which is not taken. A problem has settled, and is not looked
    at again, when its step is below `smallest_step` or its damping above LARGEST_DAMPING.
    """
    parameters = start.clone()
    active = torch.ones(len(start), dtype=torch.bool, device=start.device)
    damping = torch.full_like(parameters[:, 0], 1e-2)
    error = residual(parameters, torch.arange(len(start), device=start.device))
    cost = error.square().sum(1)
    for _ in range(iterations):
        rows = active.nonzero()[:, 0]
        if len(rows) == 0:
            break
        slopes = jacobian(parameters[rows], rows)  # [n, m, p]
        normal = slopes.mT @ slopes
        damped = normal + torch.diag_embed(damping[rows, None] * normal.diagonal(dim1=1, dim2=2) + 1e-9)
        step = -torch.linalg.solve(damped, slopes.mT @ error[rows, :, None])[..., 0]
        moved = parameters[rows] + step.clamp(-largest_step, largest_step)
        new_error = residual(moved, rows)
        new_cost = new_error.square().sum(1)
        better = new_cost < cost[rows]
        taken = rows[better]
        parameters[taken], error[taken], cost[taken] = moved[better], new_error[better], new_cost[better]
        damping[rows] *= torch.where(better, 0.2, 10.0).to(damping)
        active[rows] = (step.abs().amax(dim=1) >= smallest_step) & (damping[rows] <= LARGEST_DAMPING)
    return parameters, ~active
