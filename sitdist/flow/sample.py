"""Latents of packed poses, by the ODE of the flow or an SDE with its marginals (Ma et al. 2024, section 2.3).

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
from sitdist.flow import draws
from sitdist.flow.choices import GENERATORS, STOCHASTIC, Diffusion, LastStep
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.interpolant import EPSILON, Interpolant
from sitdist.flow.predict import GUIDED_CHANNELS, guided, require_gaussian
from sitdist.flow.solve import MOST_STEPS, Model, generate

DIFFUSIONS = get_args(Diffusion)
LAST_STEPS = get_args(LastStep)
PUBLISHED_SPELLING = {"inccreasing-decreasing": "increasing-decreasing"}


@dataclass(frozen=True)
class SampleOptions:
    """How latents are generated.

    `generator`: a solver of the ODE, or one of STOCHASTIC, which need the gaussian endpoint and read the last four
    fields. `tolerance`: of adaptive solvers and implicit_adams. `guidance`: the scale of classifier-free guidance on
    all channels or, as published, on three; None is off.

    An SDE takes `steps` equal intervals, then the last step over `last_step_size`, without noise (None: no last step,
    and the intervals reach to the end). The published `num_steps` counts grid points: its 250 are 249 steps here.
    """

    generator: str = "heun"
    steps: int = 10
    tolerance: float = 1e-6
    guidance: float | None = None
    guidance_channels: str = "all"
    diffusion: str = "SBDM"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        checks.choice("generator", self.generator, GENERATORS)
        checks.whole("generator steps", self.steps, 1, MOST_STEPS)
        checks.number("generator tolerance", self.tolerance, 1e-30)
        checks.choice("guidance channels", self.guidance_channels, GUIDED_CHANNELS)
        if self.guidance is not None:
            checks.number("guidance", self.guidance, 0.0)
        checks.choice("SDE diffusion", self.diffusion, (*DIFFUSIONS, *PUBLISHED_SPELLING))
        checks.number("SDE norm", self.diffusion_norm, 1e-9)
        if self.last_step is not None:
            checks.choice("SDE last step", self.last_step, LAST_STEPS)
            checks.number("SDE last_step_size", self.last_step_size, 1e-9, 1.0 - 1e-9)


@torch.no_grad()
def sample_latents(
    model: Model,
    interpolant: Interpolant,
    endpoint: Endpoint,
    packed_pose: Tensor,
    y: Tensor,
    shape: torch.Size,
    options: SampleOptions,
    seed: int,
    stream: str,
    positions: Tensor,
) -> Tensor:
    """Latents x1 [B, *shape] of packed poses [B, 4, 4] and labels `y` [B].

    All noise is keyed by (seed, stream, position), `positions` [B]: the batch around a sample changes nothing, but for
    adaptive solvers.
    """
    x0 = endpoint.x0(packed_pose, _normal(seed, stream, positions, shape))  # [B, C, h, w]
    velocity = endpoint.conditioned(model, packed_pose)
    if options.guidance is not None:
        velocity = guided(velocity, options.guidance, options.guidance_channels)
    if options.generator not in STOCHASTIC:
        return generate(velocity, interpolant, x0, y, options.generator, options.steps, options.tolerance)

    def kick(step: int) -> Tensor:
        return _normal(seed, f"{stream} step {step}", positions, shape)

    return generate_sde(velocity, interpolant, x0, y, kick, options, endpoint.kind)


def _normal(seed: int, stream: str, positions: Tensor, shape: torch.Size) -> Tensor:
    return draws.normal(seed, stream, positions, shape.numel()).reshape(-1, *shape)


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


def sde_interval(interpolant: Interpolant, options: SampleOptions) -> tuple[float, float]:
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
    options: SampleOptions,
    endpoint: str,
) -> Tensor:
    """x1 [B, C, h, w] from x0 ~ N(0, I), by a model of the velocity; `noise(k)` is the standard normal of step k.

    The last step is one of the drift (Mean), one of the ODE (Euler), or the jump to E[x1 | x_t] (Tweedie).
    ConfigError unless `endpoint` is gaussian.
    """
    require_gaussian(endpoint, "SDE sampling")
    start, stop = sde_interval(interpolant, options)
    times = torch.linspace(start, stop, options.steps + 1, dtype=x0.dtype, device=x0.device)

    def w(t: Tensor) -> Tensor:
        return diffusion(interpolant, options.diffusion, t, options.diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x))
        velocity = model(x, t, y)
        return velocity + w(t[:1]) * interpolant.score_from_velocity(velocity, x, t)

    x = x0
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        h = then - now
        kick = (2.0 * h * w(now)).sqrt() * noise(step)
        if options.generator == "euler_maruyama":
            x = x + h * drift(x, now) + kick
        else:  # the noise of the whole step, then Heun's step of the drift from there
            x = x + kick
            slope = drift(x, now)
            x = x + 0.5 * h * (slope + drift(x + h * slope, then))
    if options.last_step is None:
        return x
    if options.last_step == "Mean":
        return x + options.last_step_size * drift(x, times[-1])
    t = times[-1].expand(len(x))
    if options.last_step == "Euler":
        return x + options.last_step_size * model(x, t, y)
    return interpolant.posterior_x1(model(x, t, y), x, t)
