"""The t = 0 end of the flow, and the times at which a training step looks at it."""

from __future__ import annotations

import torch
from torch import Tensor

from sitdist.geometry.packing import pack


def pose_endpoint(packed_pose: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x0 = pack(pose) + sigma * noise, [B, C, h, w] like `noise`, from packed poses [B, 4, 4]."""
    return pack(packed_pose.to(noise.dtype), *noise.shape[1:]) + sigma * noise


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
