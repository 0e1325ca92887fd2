"""From what a network predicts (the velocity, x0, or the score) to the velocity that everything else asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sitdist.errors import ConfigError
from sitdist.flow.choices import GuidedChannels
from sitdist.flow.interpolant import Interpolant, check_prediction

GUIDED_CHANNELS = get_args(GuidedChannels)


def require_gaussian(endpoint: str, what: str) -> None:
    """ConfigError unless x0 is drawn from N(0, I), the only case in which the score follows from the velocity."""
    if endpoint != "gaussian":
        raise ConfigError(
            f"{what} needs the gaussian endpoint, not '{endpoint}': score = -E[x0 | x_t] / sigma(t) holds for "
            "x0 ~ N(0, I) only; use velocity or x0 prediction and an ODE, or set flow.endpoint: gaussian"
        )


class VelocityModel(nn.Module):
    """A network that predicts x0 or the score, as one that predicts the velocity; same arguments, same weights."""

    def __init__(self, network: nn.Module, interpolant: Interpolant, prediction: str) -> None:
        super().__init__()
        self.network, self.interpolant, self.prediction = network, interpolant, check_prediction(prediction)

    def forward(self, x_t: Tensor, t: Tensor, *conditions: Any, **named: Any) -> Tensor:
        """Velocity at `x_t` [B, C, h, w], times `t` [B] between the path's t_zero and t_one; the rest is passed on."""
        output = self.network(x_t, t, *conditions, **named)
        convert = self.interpolant.velocity_from_x0 if self.prediction == "x0" else self.interpolant.velocity_from_score
        return convert(output.to(x_t.dtype), x_t, t)


def velocity_model(network: nn.Module, interpolant: Interpolant, prediction: str) -> nn.Module:
    """`network` as a model of the velocity: itself where that is what it predicts."""
    return network if check_prediction(prediction) == "velocity" else VelocityModel(network, interpolant, prediction)


def guided(model: Callable[..., Tensor], scale: float, channels: str = "all") -> Callable[..., Tensor]:
    """Classifier-free guidance: v(none) + scale * (v(y) - v(none)), by one evaluation of a doubled batch.

    `three`: as in the published code, only the first three channels are guided and the others are those of v(y).
    Guiding a prediction of x0 or the score would be the same, as both are affine in the velocity. Ho & Salimans 2022.
    """
    if channels not in GUIDED_CHANNELS:
        raise ConfigError(f"guidance channels '{channels}': unknown; choose one of {', '.join(GUIDED_CHANNELS)}")

    def velocity(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        dropped = torch.arange(2 * len(x_t), device=x_t.device) >= len(x_t)
        both = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, y]), dropped)
        with_label, without = both.chunk(2)
        out = without + scale * (with_label - without)
        return out if channels == "all" else torch.cat([out[:, :3], with_label[:, 3:]], dim=1)

    return velocity
