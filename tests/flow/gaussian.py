"""A flow whose everything is known: x0 ~ N(0, I) and x1 ~ N(mean, deviation^2 I), independent."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist.flow.interpolant import Interpolant, like


@dataclass
class GaussianFlow:
    """Its velocity is that of conditional means of Gaussians; it is called like a model of the velocity."""

    path: Interpolant
    mean: float = 1.5
    deviation: float = 0.5

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t."""
        alpha, sigma, _, _ = self.path.coefficients(t)
        return alpha * self.mean, (alpha * self.deviation).square() + sigma.square()

    def x0(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """E[x0 | x_t]"""
        mean, variance = self.moments(like(t, x))
        return self.path.coefficients(like(t, x))[1] / variance * (x - mean)

    def score(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        mean, variance = self.moments(like(t, x))
        return -(x - mean) / variance

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(like(t, x))
        mean, variance = self.moments(like(t, x))
        slope = (alpha * d_alpha * self.deviation**2 + sigma * d_sigma) / variance
        return d_alpha * self.mean + slope * (x - mean)

    def log_density(self, x1: Tensor) -> Tensor:
        """Of x1, [B]."""
        return torch.distributions.Normal(self.mean, self.deviation).log_prob(x1).flatten(1).sum(dim=1)
