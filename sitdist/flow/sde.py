"""Generate by a stochastic differential equation whose marginals are those of the ODE (Ma et al. 2024, section 2.3).

    dx = (v(x, t) + w(t) s(x, t)) dt + sqrt(2 w(t)) dW        for any w >= 0

The score s follows from the velocity where x0 ~ N(0, I), so there is no such equation for the pose endpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sitdist import checks
from sitdist.errors import ConfigError
from sitdist.flow.choices import Diffusion, LastStep
from sitdist.flow.interpolant import EPSILON, Interpolant
from sitdist.flow.predict import require_gaussian
from sitdist.flow.solve import MOST_STEPS, Model

SDE_METHODS = ("euler_maruyama", "heun")
DIFFUSIONS = get_args(Diffusion)
LAST_STEPS = get_args(LastStep)
PUBLISHED_SPELLING = {"inccreasing-decreasing": "increasing-decreasing"}


@dataclass(frozen=True)
class SdeOptions:
    """How the equation is solved.

    `steps` equal intervals, then the last step over `last_step_size`, without noise (None: no last step, and the
    intervals reach to the end). The published `num_steps` counts grid points: its 250 are 249 steps here.
    """

    method: str = "euler_maruyama"
    steps: int = 249
    diffusion: str = "SBDM"
    norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        checks.choice("SDE solver", self.method, SDE_METHODS)
        checks.choice("SDE diffusion", self.diffusion, (*DIFFUSIONS, *PUBLISHED_SPELLING))
        checks.whole("SDE steps", self.steps, 1, MOST_STEPS)
        checks.number("SDE norm", self.norm, 1e-9)
        if self.last_step is not None:
            checks.choice("SDE last step", self.last_step, LAST_STEPS)
            checks.number("SDE last_step_size", self.last_step_size, 1e-9, 1.0 - 1e-9)


def diffusion(interpolant: Interpolant, form: str, t: Tensor, norm: float = 1.0) -> Tensor:
    """w(t) >= 0 at times `t`, of their shape; `norm` scales it (in `decreasing`, as published, the cosine only)."""
    alpha, sigma, d_alpha, d_sigma = interpolant.coefficients(t)
    match PUBLISHED_SPELLING.get(form, form):
        case "constant":
            return torch.full_like(t, norm)
        case "SBDM":  # that of the diffusion whose probability flow the path is; infinite where alpha is 0
            return norm * sigma * (d_alpha * sigma - alpha * d_sigma) / alpha
        case "sigma":
            return norm * sigma
        case "linear":
            return norm * (1.0 - t)
        case "decreasing":
            return 0.25 * (norm * (math.pi * t).cos() + 1.0).square()
        case "increasing-decreasing":
            return norm * (math.pi * t).sin().square()
    raise ConfigError(f"SDE diffusion '{form}': unknown; choose one of {', '.join(DIFFUSIONS)}")


def sde_interval(interpolant: Interpolant, options: SdeOptions) -> tuple[float, float]:
    """The times between which drift and diffusion are finite, less the last step.

    At t = 1 the score is infinite; at t = 0 SBDM's diffusion is, and what the path says of its velocity.
    """
    sbdm = options.diffusion == "SBDM" and interpolant.starts_without_x1
    start = max(interpolant.t_zero, EPSILON) if sbdm else interpolant.t_zero
    return start, 1.0 - (EPSILON if options.last_step is None else options.last_step_size)


def generate_sde(
    model: Model,
    interpolant: Interpolant,
    x0: Tensor,
    y: Tensor,
    noise: Callable[[int], Tensor],
    options: SdeOptions,
    endpoint: str,
) -> Tensor:
    """x1 [B, C, h, w] from x0 ~ N(0, I), by a model of the velocity; `noise(k)` is the standard normal of step k.

    ConfigError unless `endpoint` is gaussian.
    """
    require_gaussian(endpoint, "SDE sampling")
    start, stop = sde_interval(interpolant, options)
    times = torch.linspace(start, stop, options.steps + 1, dtype=x0.dtype, device=x0.device)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x))
        velocity = model(x, t, y)
        return velocity + _at(interpolant, options, t[:1]) * interpolant.score_from_velocity(velocity, x, t)

    x = x0
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        h = then - now
        kick = (2.0 * h * _at(interpolant, options, now)).sqrt() * noise(step)
        if options.method == "euler_maruyama":
            x = x + h * drift(x, now) + kick
        else:  # the noise of the whole step, then Heun's step of the drift from there
            x = x + kick
            slope = drift(x, now)
            x = x + 0.5 * h * (slope + drift(x + h * slope, then))
    return _last_step(model, interpolant, x, y, drift, times[-1], options)


def _at(interpolant: Interpolant, options: SdeOptions, t: Tensor) -> Tensor:
    return diffusion(interpolant, options.diffusion, t, options.norm)


def _last_step(
    model: Model,
    interpolant: Interpolant,
    x: Tensor,
    y: Tensor,
    drift: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    options: SdeOptions,
) -> Tensor:
    """Mean: a step of the drift; Euler: a step of the ODE; Tweedie: E[x1 | x_t], which is no step but a jump."""
    times = t.expand(len(x))
    if options.last_step == "Mean":
        return x + options.last_step_size * drift(x, t)
    if options.last_step == "Euler":
        return x + options.last_step_size * model(x, times, y)
    if options.last_step == "Tweedie":
        return interpolant.posterior_x1(model(x, times, y), x, times)
    return x
