"""Integrate the learned velocity: forward it renders, backward it reads the pose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from sitdist.errors import ConfigError
from sitdist.flow.choices import ADAPTIVE, FIXED_STEP, MULTI_STEP, SOLVERS
from sitdist.flow.interpolant import Interpolant

Model = Callable[..., Tensor]

MOST_STEPS = 10**6  # so that in float32 times differ
MEMORY = 5  # earlier iterates that Anderson's acceleration looks at
RIDGE = 1e-10  # of its least squares, relative to the trace


def integrate(derivative: Callable[..., Any], state: Any, times: Tensor, method: str, tolerance: float) -> Any:
    """torchdiffeq's odeint from times[0] to times[-1]: the last state; ConfigError if there is no such method.

    `times` [steps + 1] are the steps of the methods whose steps have a fixed size. An adaptive one ends on the last of
    them instead of interpolating from beyond, where a velocity may be infinite. A tolerance (adaptive methods,
    implicit_adams) is met over the whole batch, so that a result depends on it.
    """
    if method not in SOLVERS:
        raise ConfigError(f"solver '{method}': unknown; choose one of {', '.join(SOLVERS)}")
    name, options = FIXED_STEP[method][0] if method in FIXED_STEP else method, dict[str, Any]()
    if method in MULTI_STEP:
        options = {"max_order": 5}  # order 4; of order 11, torchdiffeq's default, the explicit one is not stable
    elif method in ADAPTIVE:
        times = times[[0, -1]]
        options = {} if method == "scipy_solver" else {"step_t": times[-1:]}
    out = odeint(derivative, state, times, method=name, rtol=tolerance, atol=tolerance, options=options)
    return tuple(each[-1] for each in out) if isinstance(state, tuple) else out[-1]


def function_evaluations(method: str, steps: int) -> int:
    """How often a fixed-step method evaluates the model on `steps` intervals."""
    return FIXED_STEP[method][1] * steps


def generate(
    model: Model,
    interpolant: Interpolant,
    x0: Tensor,
    y: Tensor,
    method: str = "heun",
    steps: int = 10,
    tolerance: float = 1e-6,
) -> Tensor:
    """x1 [B, C, h, w] from x0: integrate from t = 0 to 1 on `steps` equal intervals."""
    return _integrate(model, x0, y, interpolant.t_zero, interpolant.t_one, method, steps, tolerance)


def invert(
    model: Model,
    interpolant: Interpolant,
    x1: Tensor,
    y: Tensor,
    method: str = "heun",
    steps: int = 10,
    tolerance: float = 1e-6,
) -> Tensor:
    """x0 [B, C, h, w] from x1: integrate from t = 1 to 0 on `steps` equal intervals."""
    return _integrate(model, x1, y, interpolant.t_one, interpolant.t_zero, method, steps, tolerance)


def invert_at_arrival(model: Model, interpolant: Interpolant, x1: Tensor, y: Tensor, steps: int) -> Tensor:
    """x0 by explicit Euler with the velocity taken at the time of arrival, t - h, as the source's code does it."""
    times = torch.linspace(interpolant.t_one, interpolant.t_zero, steps + 1, dtype=x1.dtype, device=x1.device)
    x = x1
    for start, stop in itertools.pairwise(times):
        x = x + (stop - start) * model(x, stop.expand(len(x)), y)
    return x


def _integrate(
    model: Model, x: Tensor, y: Tensor, start: float, stop: float, method: str, steps: int, tolerance: float
) -> Tensor:
    times = torch.linspace(start, stop, steps + 1, dtype=x.dtype, device=x.device)

    def velocity(t: Tensor, x_t: Tensor) -> Tensor:
        return model(x_t, t.expand(len(x_t)), y)

    return integrate(velocity, x, times, method, tolerance)


# ------------------------------------------------------------------------------------------------- undoing a generator


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

    A step of an explicit method is x_next = Phi(x), and x = x + (x_next - Phi(x)) is solved for x, view by view, by a
    fixed-point iteration with Anderson's acceleration (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011).
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
    x = target
    earlier: tuple[Tensor, Tensor] | None = None
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
        earlier = None if earlier is None else (earlier[0][going], earlier[1][going])
        x, earlier = _accelerated(x, residual, earlier)
    return best, iterations, least <= tolerance


def _accelerated(
    x: Tensor, residual: Tensor, earlier: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The next iterate, and the last iterates and residuals, [B, k, D] each, of which `earlier` are those before.

    It is x + residual, less what their linear model says is left of the residual.
    """
    now, left = x.flatten(1).double(), residual.flatten(1).double()
    if earlier is None:
        return x + residual, (now[:, None], left[:, None])
    iterates = torch.cat([earlier[0], now[:, None]], dim=1)[:, -MEMORY - 1 :]
    residuals = torch.cat([earlier[1], left[:, None]], dim=1)[:, -MEMORY - 1 :]
    d_x, d_residual = iterates.diff(dim=1), residuals.diff(dim=1)  # [B, k, D]
    gram = d_residual @ d_residual.mT
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + ridge[:, None, None] * identity, d_residual @ left[..., None])  # [B, k, 1]
    step = left - (weights * (d_x + d_residual)).sum(dim=1)
    return x + step.reshape(x.shape).to(x.dtype), (iterates, residuals)
