"""A pose as a tensor of the latent's shape: standardize its sixteen entries, then spread them over the channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sitdist.errors import PoseError
from sitdist.geometry.pose import project_to_so3

CONSTANT_DEVIATION = 1e-4
Layout = Literal["quadrants", "interleaved"]


@dataclass(frozen=True)
class PoseStatistics:
    """Mean and standard deviation of every entry of camera_to_world over the training views, [4, 4] float64 each.

    With `has_intrinsics` the last row, constant otherwise, is that of the normalized intrinsics (fx / width,
    fy / height, cx / width, cy / height). An entry that hardly varies (deviation below 1e-4) has deviation 1, so that
    rounding does not become signal.
    """

    mean: Tensor
    std: Tensor
    has_intrinsics: bool = False

    @classmethod
    def from_poses(cls, camera_to_world: Tensor, intrinsics: Tensor | None = None) -> PoseStatistics:
        """Statistics over poses [N, 4, 4] and, if given, normalized intrinsics [N, 4], in float64.

        The deviation is the population's.
        """
        rows = _with_intrinsics(camera_to_world, intrinsics)
        std = rows.std(dim=0, correction=0)
        std = torch.where(std < CONSTANT_DEVIATION, torch.ones_like(std), std)
        return cls(rows.mean(dim=0), std, intrinsics is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, rotation, translation and intrinsics apart; a constant last row is implied."""
        values = {
            "rotation": {"mean": self.mean[:3, :3].tolist(), "std": self.std[:3, :3].tolist()},
            "translation": {"mean": self.mean[:3, 3].tolist(), "std": self.std[:3, 3].tolist()},
        }
        if self.has_intrinsics:
            values["intrinsics"] = {"mean": self.mean[3].tolist(), "std": self.std[3].tolist()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PoseStatistics:
        """The inverse of `to_dict`."""
        mean, std = torch.eye(4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64)
        for name, columns in (("rotation", slice(0, 3)), ("translation", 3)):
            mean[:3, columns] = torch.tensor(values[name]["mean"], dtype=torch.float64)
            std[:3, columns] = torch.tensor(values[name]["std"], dtype=torch.float64)
        if "intrinsics" in values:
            mean[3], std[3] = (
                torch.tensor(values["intrinsics"][name], dtype=torch.float64) for name in ("mean", "std")
            )
        return cls(mean, std, "intrinsics" in values)


def _with_intrinsics(camera_to_world: Tensor, intrinsics: Tensor | None) -> Tensor:
    """Poses [..., 4, 4] in float64, the last row replaced by normalized intrinsics [..., 4] if given."""
    rows = camera_to_world.to(torch.float64)
    if intrinsics is None:
        return rows
    return torch.cat([rows[..., :3, :], intrinsics.to(rows)[..., None, :]], dim=-2)


def standardize(camera_to_world: Tensor, statistics: PoseStatistics, intrinsics: Tensor | None = None) -> Tensor:
    """Packed pose [..., 4, 4], float64: each entry less its mean, over its deviation.

    The last row is that of the normalized `intrinsics` [..., 4] where the statistics have them, and then they must be
    given (PoseError); otherwise it becomes 0.
    """
    if statistics.has_intrinsics and intrinsics is None:
        raise PoseError("the dataset packs intrinsics with every pose, but none are given; give those of the camera")
    mean, std = (value.to(camera_to_world.device) for value in (statistics.mean, statistics.std))
    return (_with_intrinsics(camera_to_world, intrinsics if statistics.has_intrinsics else None) - mean) / std


def entries(packed_pose: Tensor, statistics: PoseStatistics) -> Tensor:
    """The matrices [..., 4, 4], float64, that packed poses stand for; where they are estimates, they are not rigid."""
    mean, std = (value.to(packed_pose.device) for value in (statistics.mean, statistics.std))
    return packed_pose.to(torch.float64) * std + mean


def destandardize(packed_pose: Tensor, statistics: PoseStatistics) -> Tensor:
    """camera_to_world [..., 4, 4], float64, from a packed pose: rotation projected to SO(3), last row [0, 0, 0, 1]."""
    matrix = entries(packed_pose, statistics)
    camera_to_world = torch.zeros_like(matrix)
    camera_to_world[..., :3, :3] = project_to_so3(matrix[..., :3, :3])
    camera_to_world[..., :3, 3] = matrix[..., :3, 3]
    camera_to_world[..., 3, 3] = 1.0
    return camera_to_world


def packed_intrinsics(packed_pose: Tensor, statistics: PoseStatistics) -> Tensor | None:
    """Normalized intrinsics [..., 4], float64, from a packed pose [..., 4, 4]; None where the statistics have none."""
    if not statistics.has_intrinsics:
        return None
    mean, std = (value[3].to(packed_pose.device) for value in (statistics.mean, statistics.std))
    return packed_pose[..., 3, :].to(torch.float64) * std + mean


def pack(packed_pose: Tensor, channels: int, height: int, width: int, layout: Layout = "quadrants") -> Tensor:
    """Spread packed poses [B, 4, 4] over a latent's shape, [B, C, h, w].

    Row i fills channels i, i + 4, ...; its four entries are the 2x2 quadrants in reading order, or, `interleaved`, the
    four places of every 2x2 block in reading order. `channels` is a multiple of 4, `height` and `width` are even.
    """
    assert channels % 4 == 0, channels
    assert height % 2 == 0 == width % 2, (height, width)
    blocks = packed_pose.reshape(-1, 4, 2, 2).repeat(1, channels // 4, 1, 1)  # [B, C, 2, 2]
    if layout == "interleaved":
        return blocks.repeat(1, 1, height // 2, width // 2)
    return blocks.repeat_interleave(height // 2, dim=2).repeat_interleave(width // 2, dim=3)


def unpack(x: Tensor, layout: Layout = "quadrants") -> Tensor:
    """Packed poses [B, 4, 4] from [B, C, h, w]: each entry is the mean over all places that `pack` filled with it."""
    return _places(x, layout).mean(dim=-1)


def unpack_spread(x: Tensor, layout: Layout = "quadrants") -> Tensor:
    """Standard errors [B, 4, 4] of what `unpack` gives: the deviation over an entry's n places, over the root of n.

    That is its error where the places err independently; 0 where an entry has one place.
    """
    places = _places(x, layout)
    count = places.shape[-1]
    return places.std(dim=-1) / math.sqrt(count) if count > 1 else torch.zeros_like(places[..., 0])


def _places(x: Tensor, layout: Layout) -> Tensor:
    """The values [B, 4, 4, n] of the n = C h w / 16 places that hold each entry of a packed pose."""
    batch, channels, height, width = x.shape
    if layout == "interleaved":
        parts = x.reshape(batch, channels // 4, 4, height // 2, 2, width // 2, 2).permute(0, 2, 4, 6, 1, 3, 5)
    else:
        parts = x.reshape(batch, channels // 4, 4, 2, height // 2, 2, width // 2).permute(0, 2, 3, 5, 1, 4, 6)
    return parts.reshape(batch, 4, 4, -1)
