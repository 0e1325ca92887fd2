"""How likely a latent is under the flow: the instantaneous change of variables (Chen et al. 2018, theorem 1).

    log p(x1) = log p(x0) - integral over t from 0 to 1 of div v(x_t, t)

The divergence is estimated by Hutchinson probes, E[e . (dv/dx) e] (Grathwohl et al. 2019), and p(x0) is the density
that the endpoint really has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow import draws
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.solve import Model, integrate


class Base(Protocol):
    """The density of x0."""

    def log_density(self, x0: Tensor) -> Tensor:
        """Natural logarithm at `x0` [B, C, h, w], float64 [B]."""
        ...


class GaussianBase:
    """x0 ~ N(0, I)."""

    def log_density(self, x0: Tensor) -> Tensor:
        return _normal(x0.double().flatten(1).square().sum(dim=1), x0[0].numel(), 1.0)


class PoseBase:
    """The mixture of N(mean_i, sigma^2 I), in equal parts, over the x0 of the training poses without noise.

    `means` [N, C, h, w]: such as pose_endpoint(packed_poses, zeros, 0). ConfigError if sigma is 0: x0 then lies on the
    poses alone and has no density.
    """

    def __init__(self, means: Tensor, sigma: float) -> None:
        if sigma <= 0:
            raise ConfigError(
                f"flow.sigma = {sigma:g}: without noise on the packed poses x0 has no density, so there is no "
                "likelihood; train with flow.sigma above 0"
            )
        self.means, self.sigma = means, sigma

    def log_density(self, x0: Tensor) -> Tensor:
        x = x0.double().flatten(1)  # [B, D]
        chunks = self.means.to(x.device).flatten(1).split(4096)
        squares = torch.cat([torch.cdist(x, chunk.double()).square() for chunk in chunks], dim=1)  # [B, N]
        return _normal(squares, x.shape[1], self.sigma).logsumexp(dim=1) - math.log(len(self.means))


def _normal(square: Tensor, dimensions: int, sigma: float) -> Tensor:
    """log N(., sigma^2 I) from the squared distance to the mean."""
    return -0.5 * square / sigma**2 - dimensions * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))


@dataclass(frozen=True)
class Likelihood:
    """Natural logarithms of densities at x1, float64 [B], and the x0 [B, C, h, w] that x1 comes from."""

    log_density: Tensor
    x0: Tensor


def rademacher(seed: int, positions: Tensor, count: int, shape: torch.Size) -> Tensor:
    """`count` probes of signs, float32 [count, B, C, h, w], keyed by (seed, global position)."""
    numbers = draws.uniform(seed, "probes", positions, count * shape.numel())
    signs = torch.where(numbers < 0.5, -1.0, 1.0).to(torch.float32)
    return signs.reshape(-1, count, *shape).transpose(0, 1)


def log_likelihood(
    model: Model,
    interpolant: Interpolant,
    x1: Tensor,
    y: Tensor,
    base: Base,
    probes: Tensor,
    method: str = "heun",
    steps: int = 50,
    tolerance: float = 1e-6,
) -> Likelihood:
    """The log density of latents `x1` [B, C, h, w] of labels `y` [B], by integrating back to x0.

    `probes` [K, B, C, h, w] have mean 0 and unit covariance, such as `rademacher`'s; they stay the same along the
    trajectory, so that it is that of one ODE. The estimate is unbiased, its variance falls as 1 / K.
    """
    times = torch.linspace(interpolant.t_one, interpolant.t_zero, steps + 1, dtype=x1.dtype, device=x1.device)

    def derivatives(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _velocity_and_divergence(model, state[0], t.expand(len(x1)), y, probes.to(x1.dtype))

    start = (x1, torch.zeros(len(x1), dtype=x1.dtype, device=x1.device))
    x0, gathered = integrate(derivatives, start, times, method, tolerance)
    # Integrated from 1 down to 0, what is gathered is minus the integral of the divergence.
    return Likelihood(base.log_density(x0) + gathered.double(), x0)


def _velocity_and_divergence(model: Model, x: Tensor, t: Tensor, y: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        velocity = model(x, t, y)
        products = [torch.autograd.grad(velocity, x, probe, retain_graph=True)[0] * probe for probe in probes]
    return velocity.detach(), torch.stack(products).flatten(2).sum(dim=2).mean(dim=0)
