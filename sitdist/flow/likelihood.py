"""How likely a latent is under the flow, given its pose: the instantaneous change of variables (Chen et al. 2018).

    log p(x1 | pose) = log p(x0 | pose) - integral over t from 0 to 1 of div v(x_t, t)

The divergence is estimated by Hutchinson probes, E[e . (dv/dx) e] (Grathwohl et al. 2019). Given the pose, x0 is a
Gaussian: N(gain * pack(pose), sigma^2 I), or N(0, I) with the gaussian endpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sitdist.flow import draws
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.solve import Model, integrate


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
    mean: Tensor,
    sigma: float,
    probes: Tensor,
    method: str = "heun",
    steps: int = 50,
    tolerance: float = 1e-6,
) -> Tensor:
    """Log densities (nats), float64 [B], of latents `x1` [B, C, h, w] of labels `y` [B], by integrating back to x0.

    x0 is distributed as N(mean, sigma^2 I), `mean` [B, C, h, w], `sigma` above 0.

    `probes` [K, B, C, h, w] have mean 0 and unit covariance, such as `rademacher`'s; they stay the same along the
    trajectory, so that it is that of one ODE. The estimate is unbiased, its variance falls as 1 / K.
    """
    times = torch.linspace(interpolant.t_one, interpolant.t_zero, steps + 1, dtype=x1.dtype, device=x1.device)

    def derivatives(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _velocity_and_divergence(model, state[0], t.expand(len(x1)), y, probes.to(x1.dtype))

    start = (x1, torch.zeros(len(x1), dtype=x1.dtype, device=x1.device))
    x0, gathered = integrate(derivatives, start, times, method, tolerance)
    square = (x0.double() - mean.double()).flatten(1).square().sum(dim=1)
    log_density = -0.5 * square / sigma**2 - x0[0].numel() * (math.log(sigma) + 0.5 * math.log(2.0 * math.pi))
    # Integrated from 1 down to 0, what is gathered is minus the integral of the divergence.
    return log_density + gathered.double()


def _velocity_and_divergence(model: Model, x: Tensor, t: Tensor, y: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        velocity = model(x, t, y)
        products = [torch.autograd.grad(velocity, x, probe, retain_graph=True)[0] * probe for probe in probes]
    return velocity.detach(), torch.stack(products).flatten(2).sum(dim=2).mean(dim=0)
