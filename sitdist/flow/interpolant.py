"""Time, stated once: t = 0 is the endpoint that holds the pose (x0), t = 1 the latent of the picture (x1).

    x_t = alpha(t) x1 + sigma(t) x0        velocity = d x_t / dt

Elsewhere the words are `generate` (0 -> 1) and `invert` (1 -> 0). Paths and their coefficients: Ma et al., "SiT", 2024.
What is said of the score, the gradient of log p(x_t), holds for x0 ~ N(0, I) only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist.errors import ConfigError

EPSILON = 1e-3  # how near samplers come to a time at which something is infinite, as the published ones do
PREDICTIONS = ("velocity", "x0", "score")


@dataclass(frozen=True)
class InterpolantSample:
    """A point of the path and its time derivative, [B, C, h, w] each."""

    x_t: Tensor
    velocity: Tensor


class Interpolant:
    """An interpolant between x0 and x1; samplers look at it from `t_zero` to `t_one`, where its velocity is finite."""

    name: str
    t_zero: float = 0.0
    t_one: float = 1.0
    starts_without_x1: bool = True  # alpha(0) = 0: at t = 0, nothing is known of x1 but through a velocity

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma and their derivatives by t, each of the shape of `t`."""
        raise NotImplementedError

    def sample(self, x0: Tensor, x1: Tensor, t: Tensor) -> InterpolantSample:
        """The point at times `t` [B] between `x0` and `x1` [B, C, h, w], and its velocity."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(like(t, x0))
        return InterpolantSample(alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0)

    def posterior_x0(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] from the velocity at `x_t` [B, C, h, w], times `t` [B] (linear path at 1: x1 - velocity)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(like(t, x_t))
        return (alpha * velocity - d_alpha * x_t) / (alpha * d_sigma - d_alpha * sigma)

    def posterior_x1(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x1 | x_t] from the velocity at `x_t` [B, C, h, w], times `t` [B] (linear path at 0: x0 + velocity)."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(like(t, x_t))
        return (d_sigma * x_t - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)

    def velocity_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity from E[x0 | x_t]; infinite where alpha is 0. The inverse of `posterior_x0`."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(like(t, x_t))
        return (d_alpha * x_t + (alpha * d_sigma - d_alpha * sigma) * x0) / alpha

    def score_from_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The score, -E[x0 | x_t] / sigma (Tweedie's formula); infinite where sigma is 0."""
        return -self.posterior_x0(velocity, x_t, t) / self.coefficients(like(t, x_t))[1]

    def velocity_from_score(self, score: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of `score_from_velocity`; infinite where alpha is 0."""
        return self.velocity_from_x0(-self.coefficients(like(t, x_t))[1] * score, x_t, t)


class LinearInterpolant(Interpolant):
    """alpha = t, sigma = 1 - t."""

    name = "linear"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return t, 1.0 - t, torch.ones_like(t), -torch.ones_like(t)


class GvpInterpolant(Interpolant):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): variance preserving where x0 and x1 have unit variance."""

    name = "gvp"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        half_pi = 0.5 * math.pi
        sine, cosine = (half_pi * t).sin(), (half_pi * t).cos()
        return sine, cosine, half_pi * cosine, -half_pi * sine


class VpInterpolant(Interpolant):
    """The variance-preserving diffusion with rates from 0.1 to 20 (Song et al. 2021), running from noise to data.

    Its sigma is a root near t = 1, so its velocity is infinite there; at t = 0 it still holds 0.7% of x1.
    """

    name = "vp"
    t_one = 1.0 - EPSILON
    starts_without_x1 = False
    rate_min, rate_max = 0.1, 20.0

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rest = 1.0 - t
        log_alpha = -0.25 * rest.square() * (self.rate_max - self.rate_min) - 0.5 * rest * self.rate_min
        d_log_alpha = 0.5 * rest * (self.rate_max - self.rate_min) + 0.5 * self.rate_min
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2.0 * log_alpha)).sqrt()
        return alpha, sigma, alpha * d_log_alpha, -alpha.square() * d_log_alpha / sigma


INTERPOLANTS: dict[str, type[Interpolant]] = {
    interpolant.name: interpolant for interpolant in (LinearInterpolant, GvpInterpolant, VpInterpolant)
}


def get_interpolant(name: str, prediction: str = "velocity") -> Interpolant:
    """The path called `name`, for a network that predicts `prediction`; ConfigError if there is none.

    t_zero and t_one are where the velocity that follows from the prediction is finite: alpha divides for x0 and score,
    and a score is itself infinite where sigma is 0.
    """
    if name not in INTERPOLANTS:
        raise ConfigError(f"flow.path = '{name}': unknown; choose one of {', '.join(INTERPOLANTS)}")
    interpolant = INTERPOLANTS[name]()
    if check_prediction(prediction) != "velocity" and interpolant.starts_without_x1:
        interpolant.t_zero = EPSILON
    if prediction == "score":
        interpolant.t_one = 1.0 - EPSILON
    return interpolant


def check_prediction(prediction: str) -> str:
    """`prediction`, or ConfigError if it is none of PREDICTIONS."""
    if prediction not in PREDICTIONS:
        raise ConfigError(f"flow.prediction = '{prediction}': unknown; choose one of {', '.join(PREDICTIONS)}")
    return prediction


def like(t: Tensor, x: Tensor) -> Tensor:
    """Times [B] in the type of `x` [B, ...], with ones for its other dimensions."""
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # [B, 1, 1, 1]
