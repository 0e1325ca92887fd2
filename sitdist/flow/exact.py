"""Undo a fixed-step generator: the x0 from which its own steps, not those of another solver, lead to x1.

A step of an explicit method is x_next = Phi(x), and x = x + (x_next - Phi(x)) is solved for x, view by view, by a
fixed-point iteration with Anderson's acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow.choices import FIXED_STEP
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.solve import Model, integrate

MEMORY = 5  # earlier iterates that Anderson's acceleration looks at
RIDGE = 1e-10  # of its least squares, relative to the trace


@dataclass(frozen=True)
class Inversion:
    """x0 [B, C, h, w]; whether every step of a view met the tolerance, [B] bool; evaluations of the model [B] int64."""

    x0: Tensor
    converged: Tensor
    function_evaluations: Tensor


def invert_exactly(
    model: Model,
    interpolant: Interpolant,
    x1: Tensor,
    y: Tensor,
    generator: str = "heun",
    steps: int = 10,
    tolerance: float = 2e-6,
    max_iterations: int = 50,
) -> Inversion:
    """The x0 that `generate(model, path, x0, y, generator, steps)` takes to `x1` [B, C, h, w].

    Every step is solved until no entry of x_next - Phi(x) is above `tolerance`, for at most `max_iterations`; a view
    that does not get there goes on from its best iterate and is flagged. ConfigError for a generator whose steps
    depend on earlier ones, or on the batch.
    """
    if generator not in FIXED_STEP:
        raise ConfigError(
            f"generator '{generator}': only one with fixed steps of its own can be undone step by step; choose one of "
            f"{', '.join(FIXED_STEP)}"
        )
    times = torch.linspace(interpolant.t_zero, interpolant.t_one, steps + 1, dtype=x1.dtype, device=x1.device)
    x, converged = x1, torch.ones(len(x1), dtype=torch.bool, device=x1.device)
    evaluations = torch.zeros(len(x1), dtype=torch.int64, device=x1.device)
    for start in reversed(range(steps)):
        interval = times[start : start + 2]

        def step(x: Tensor, views: Tensor, interval: Tensor = interval) -> Tensor:
            labels = y[views]
            return integrate(lambda t, x_t: model(x_t, t.expand(len(x_t)), labels), x, interval, generator, 1.0)

        x, iterations, solved = _undo(step, x, tolerance, max_iterations)
        converged &= solved
        evaluations += FIXED_STEP[generator][1] * iterations
    return Inversion(x, converged, evaluations)


def _undo(
    step: Callable[[Tensor, Tensor], Tensor], target: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x with step(x) = target, the iterations it took [B], and whether the tolerance was met [B].

    `step` gets iterates and the numbers of their views; views that are done drop out.
    """
    best, views = target.clone(), torch.arange(len(target), device=target.device)
    least = torch.full((len(target),), torch.inf, dtype=target.dtype, device=target.device)
    iterations = torch.zeros_like(views)
    x, history = target, _History()
    for _ in range(max_iterations):
        residual = target[views] - step(x, views)
        size = residual.flatten(1).abs().amax(dim=1)
        iterations[views] += 1
        better = size < least[views]
        best[views[better]], least[views[better]] = x[better], size[better]
        going = (size > tolerance) & size.isfinite()
        views, x, residual = views[going], x[going], residual[going]
        if not len(views):
            break
        history = history.of(going)
        x = history.accelerated(x, residual)
    return best, iterations, least <= tolerance


class _History:
    """The last iterates and residuals of several views, [B, k, D] each, and the next iterate that they suggest."""

    def __init__(self, x: Tensor | None = None, residual: Tensor | None = None) -> None:
        self._x, self._residual = x, residual

    def of(self, views: Tensor) -> _History:
        """Of these views [B] bool."""
        if self._x is None or self._residual is None:
            return self
        return _History(self._x[views], self._residual[views])

    def accelerated(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds an iterate and its residual; x + residual, less what their linear model says is left of the residual."""
        now, left = x.flatten(1).double(), residual.flatten(1).double()
        if self._x is None or self._residual is None:
            self._x, self._residual = now[:, None], left[:, None]
            return x + residual
        self._x = torch.cat([self._x, now[:, None]], dim=1)[:, -MEMORY - 1 :]
        self._residual = torch.cat([self._residual, left[:, None]], dim=1)[:, -MEMORY - 1 :]
        d_x, d_residual = self._x.diff(dim=1), self._residual.diff(dim=1)  # [B, k, D]
        gram = d_residual @ d_residual.mT
        ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + ridge[:, None, None] * identity, d_residual @ left[..., None])  # [B, k, 1]
        step = left - (weights * (d_x + d_residual)).sum(dim=1)
        return x + step.reshape(x.shape).to(x.dtype)
