"""What is minimized."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sitdist.flow.path import Path


def velocity_loss(
    model: Callable[..., Tensor],
    path: Path,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    y: Tensor,
    drop_labels: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the predicted velocity, per sample, float32 [B] (Lipman et al. 2023, eq. 14)."""
    sample = path.sample(x0, x1, t)
    velocity = model(sample.x_t, t, y, drop_labels)  # [B, C, h, w]
    return (velocity.float() - sample.velocity.float()).square().flatten(1).mean(dim=1)
