"""The t = 0 end of the flow, and the times at which a training step looks at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.geometry.packing import Layout, pack, unpack, unpack_spread

Model = Callable[..., Tensor]


def pose_endpoint(
    packed_pose: Tensor, noise: Tensor, sigma: float, gain: float = 1.0, layout: Layout = "quadrants"
) -> Tensor:
    """x0 = gain * pack(pose) + sigma * noise, [B, C, h, w] like `noise`, from packed poses [B, 4, 4]."""
    channels, height, width = noise.shape[1:]
    return gain * pack(packed_pose.to(noise.dtype), channels, height, width, layout) + sigma * noise


@dataclass(frozen=True)
class Endpoint:
    """What x0 is: `pose`, gain * pack(pose) + sigma * noise; or `gaussian`, N(0, 1), the pose being a condition."""

    kind: Literal["pose", "gaussian"] = "pose"
    sigma: float = 0.1
    gain: float = 1.0
    layout: Layout = "quadrants"

    def x0(self, packed_pose: Tensor, noise: Tensor) -> Tensor:
        """x0 [B, C, h, w] of packed poses [B, 4, 4], with standard normal `noise` [B, C, h, w]."""
        if self.kind == "gaussian":
            return noise
        return pose_endpoint(packed_pose, noise, self.sigma, self.gain, self.layout)

    def conditioned(self, model: Model, packed_pose: Tensor) -> Model:
        """`model` for samples with these packed poses [B, 4, 4]: as it is where x0 holds them."""
        if self.kind == "pose":
            return model

        def velocity(x_t: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
            repeats = len(x_t) // len(packed_pose)  # a guided batch holds every sample twice
            return model(x_t, t, y, drop_labels, pose=packed_pose.repeat(repeats, 1, 1))

        return velocity

    def packed_pose(self, x0: Tensor) -> Tensor:
        """Packed poses [B, 4, 4] read off x0 [B, C, h, w]; ConfigError where it holds none."""
        if self.kind == "gaussian":
            raise ConfigError(
                "flow.endpoint = 'gaussian': x0 is noise and holds no pose to estimate; train with endpoint: pose"
            )
        return unpack(x0, self.layout) / self.gain

    def spread(self, x0: Tensor) -> Tensor:
        """Standard errors [B, 4, 4] of the entries of `packed_pose`, by their deviation over the places of x0."""
        return unpack_spread(x0, self.layout) / self.gain


def sample_times(
    uniforms: Tensor, share_at_one: float, share_at_zero: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Times t [B] float32 from `uniforms` [B, 2] in (0, 1).

    A share of the samples sits exactly at t = 1 (where the pose is read off a picture), a share exactly at t = 0, and
    the rest is uniform in `interval`.
    """
    choice, t = uniforms[:, 0], interval[0] + (interval[1] - interval[0]) * uniforms[:, 1]
    t = torch.where(choice < share_at_one, torch.ones_like(t), t)
    t = torch.where(choice >= 1.0 - share_at_zero, torch.zeros_like(t), t)
    return t.to(torch.float32)
