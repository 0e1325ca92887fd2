"""Integrate the learned velocity: forward it renders, backward it reads the pose."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from sitdist.errors import ConfigError
from sitdist.flow.choices import ADAPTIVE, FIXED_STEP, MULTI_STEP, SOLVERS
from sitdist.flow.interpolant import Interpolant

Model = Callable[..., Tensor]

MOST_STEPS = 10**6  # so that in float32 times differ


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
