"""What is minimized, how its terms are weighted over t, and the times at which all of it is finite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow.interpolant import EPSILON, Interpolant, check_prediction, like

LOSS_WEIGHTS = ("none", "velocity", "likelihood")
TRAINING_EPSILON_VP = 1e-5  # the published one; a sampler keeps further away


def flow_loss(
    model: Callable[..., Tensor],
    interpolant: Interpolant,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor,
    drop_labels: Tensor | None = None,
    prediction: str = "velocity",
    weight: str = "none",
) -> Tensor:
    """Mean squared error of what the model predicts, per sample, float32 [B].

    velocity: |v - d x_t / dt|^2 (Lipman et al. 2023, eq. 14); x0: w(t) |x0^ - x0|^2; score: w(t) |sigma s + x0|^2, the
    denoising score matching loss times sigma^2 (Ma et al. 2024, eq. 8).
    """
    sample = interpolant.sample(x0, x1, t)
    output = model(sample.x_t, t, y, drop_labels).float()  # [B, C, h, w]
    if check_prediction(prediction) == "velocity":
        return (output - sample.velocity.float()).square().flatten(1).mean(dim=1)
    predicted = output if prediction == "x0" else -interpolant.coefficients(like(t, output))[1] * output
    return loss_weight(interpolant, weight, t.float()) * (predicted - x0.float()).square().flatten(1).mean(dim=1)


def loss_weight(interpolant: Interpolant, weight: str, t: Tensor) -> Tensor:
    """The factor on the squared error of x0 at times `t`, of their shape.

    velocity: (D / alpha)^2, D = alpha sigma' - alpha' sigma, makes it the squared error of the velocity. likelihood:
    -D / (alpha sigma) makes it that of the score times the diffusion of SBDM, which bounds the likelihood of the SDE
    (Song et al. 2021, "Maximum likelihood training").
    """
    alpha, sigma, d_alpha, d_sigma = interpolant.coefficients(t)
    determinant = alpha * d_sigma - d_alpha * sigma
    if weight == "none":
        return torch.ones_like(t)
    if weight == "velocity":
        return (determinant / alpha).square()
    if weight == "likelihood":
        return -determinant / (alpha * sigma)
    raise ConfigError(f"flow.loss_weight = '{weight}': unknown; choose one of {', '.join(LOSS_WEIGHTS)}")


def weigh_times(loss: Tensor, t: Tensor, weight_at_one: float) -> Tensor:
    """The losses [B] of samples at times t [B], those at t = 1 times `weight_at_one`.

    At t = 1 the loss falls far below that at other times, where it keeps the variance of x1 given x_t, so that in a sum
    of both the gradient of what reads the pose is lost in the noise of the other's.
    """
    return torch.where(t == 1, weight_at_one * loss, loss)


def training_interval(interpolant: Interpolant, prediction: str, weight: str) -> tuple[float, float]:
    """The times between which the loss and its gradient are finite and say something.

    Only a weight divides by alpha. At t = 1 the VP path's velocity and the likelihood weight are infinite, and the
    loss of a score does not depend on it.
    """
    start = EPSILON if weight != "none" and interpolant.starts_without_x1 else 0.0
    if interpolant.name == "vp":
        return start, 1.0 - TRAINING_EPSILON_VP
    return start, 1.0 - EPSILON if prediction == "score" or weight == "likelihood" else 1.0
