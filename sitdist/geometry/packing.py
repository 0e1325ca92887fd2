"""A pose as a tensor of the latent's shape: standardize its sixteen entries, then spread them over the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sitdist.geometry.pose import project_to_so3

CONSTANT_DEVIATION = 1e-4


@dataclass(frozen=True)
class PoseStatistics:
    """Mean and standard deviation of every entry of camera_to_world over the training views, [4, 4] float64 each.

    An entry that hardly varies (deviation below 1e-4, the last row always) has deviation 1, so that rounding does not
    become signal.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def from_poses(cls, camera_to_world: Tensor) -> PoseStatistics:
        """Statistics over poses [N, 4, 4], in float64, with the population's deviation."""
        poses = camera_to_world.to(torch.float64)
        std = poses.std(dim=0, correction=0)
        return cls(poses.mean(dim=0), torch.where(std < CONSTANT_DEVIATION, torch.ones_like(std), std))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, rotation and translation apart; the constant last row is implied."""
        return {
            "rotation": {"mean": self.mean[:3, :3].tolist(), "std": self.std[:3, :3].tolist()},
            "translation": {"mean": self.mean[:3, 3].tolist(), "std": self.std[:3, 3].tolist()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PoseStatistics:
        """The inverse of `to_dict`."""
        mean, std = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
        for name, columns in (("rotation", slice(0, 3)), ("translation", 3)):
            mean[:3, columns] = torch.tensor(values[name]["mean"], dtype=torch.float64)
            std[:3, columns] = torch.tensor(values[name]["std"], dtype=torch.float64)
        return cls(mean, std)


def standardize(camera_to_world: Tensor, statistics: PoseStatistics) -> Tensor:
    """Packed pose [..., 4, 4], float64: each entry less its mean, over its deviation; the last row becomes 0."""
    mean, std = (value.to(camera_to_world.device) for value in (statistics.mean, statistics.std))
    return (camera_to_world.to(torch.float64) - mean) / std


def destandardize(packed_pose: Tensor, statistics: PoseStatistics) -> Tensor:
    """camera_to_world [..., 4, 4], float64, from a packed pose: rotation projected to SO(3), last row [0, 0, 0, 1]."""
    mean, std = (value.to(packed_pose.device) for value in (statistics.mean, statistics.std))
    matrix = packed_pose.to(torch.float64) * std + mean
    camera_to_world = torch.zeros_like(matrix)
    camera_to_world[..., :3, :3] = project_to_so3(matrix[..., :3, :3])
    camera_to_world[..., :3, 3] = matrix[..., :3, 3]
    camera_to_world[..., 3, 3] = 1.0
    return camera_to_world


def pack(packed_pose: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Spread packed poses [B, 4, 4] over a latent's shape, [B, C, h, w].

    Row i fills channels i, i + 4, ...; its four entries are the 2x2 quadrants in reading order. `channels` is a
    multiple of 4, `height` and `width` are even.
    """
    assert channels % 4 == 0, channels
    assert height % 2 == 0 == width % 2, (height, width)
    quadrants = packed_pose.reshape(-1, 4, 2, 2).repeat(1, channels // 4, 1, 1)  # [B, C, 2, 2]
    return quadrants.repeat_interleave(height // 2, dim=2).repeat_interleave(width // 2, dim=3)


def unpack(x: Tensor) -> Tensor:
    """Packed poses [B, 4, 4] from [B, C, h, w]: each entry is the mean over all places that `pack` filled with it."""
    batch, channels, height, width = x.shape
    quadrants = x.reshape(batch, channels // 4, 4, 2, height // 2, 2, width // 2)
    return quadrants.mean(dim=(1, 4, 6)).reshape(batch, 4, 4)
