"""Similarities of space, and the one that brings a capture's cameras into the unit frame: centred, upright, scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sitdist.errors import PoseError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import RIGID_TOLERANCE

PARALLEL = 1e-4  # smallest curvature, per camera, of the squared distance to all optical axes: below it, no centre
LEVEL = 0.02  # mean square of the cameras' x axes along the second-flattest direction: below it, no plane is level


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation @ x + translation, float64; `rotation` [3, 3], `translation` [3]."""

    scale: float
    rotation: Tensor
    translation: Tensor

    @classmethod
    def identity(cls) -> Similarity:
        """The map that changes nothing."""
        return cls(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def points(self, points: Tensor) -> Tensor:
        """Points [..., 3] mapped."""
        return self.scale * points.to(torch.float64) @ self.rotation.T + self.translation

    def cameras(self, camera_to_world: Tensor) -> Tensor:
        """Rigid poses [..., 4, 4] mapped: turned and moved; a camera itself has no size, so they stay rigid."""
        mapped = camera_to_world.to(torch.float64).clone()
        mapped[..., :3, :3] = self.rotation @ mapped[..., :3, :3]
        mapped[..., :3, 3] = self.points(mapped[..., :3, 3])
        return mapped

    def inverse(self) -> Similarity:
        """The map back."""
        rotation, scale = self.rotation.T, 1.0 / self.scale
        return Similarity(scale, rotation, -scale * rotation @ self.translation)

    def then(self, other: Similarity) -> Similarity:
        """First this map, then `other`."""
        return Similarity(other.scale * self.scale, other.rotation @ self.rotation, other.points(self.translation))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `from_dict` gives the same similarity back, bit for bit."""
        return {
            "scale": self.scale,
            "rotation": self.rotation.tolist(),
            "translation": self.translation.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Similarity:
        """What `to_dict` gave; ValueError, KeyError or TypeError if it is no similarity."""
        rotation, translation = (torch.tensor(values[key], dtype=torch.float64) for key in ("rotation", "translation"))
        scale, identity = float(values["scale"]), torch.eye(3, dtype=torch.float64)
        if rotation.shape != (3, 3) or not torch.allclose(rotation @ rotation.T, identity, atol=RIGID_TOLERANCE):
            raise ValueError(f"rotation {values['rotation']!r:.80} is no rotation")
        if torch.linalg.det(rotation) < 0 or translation.shape != (3,) or not translation.isfinite().all():
            raise ValueError("rotation is a mirror, or translation is not three finite numbers")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale {scale} is not positive")
        return cls(scale, rotation, translation)


def capture_frame(camera_to_world: Tensor, intrinsics: Sequence[Intrinsics]) -> Similarity:
    """The similarity from the frame of a capture, poses [N, 4, 4], to the unit frame.

    There, the cameras look at the origin, +z is up, and the ball that a picture shows about the origin has radius 1
    (the median over the pictures). A capture that is upright already is not turned. PoseError where the cameras do
    not stand around one object.
    """
    poses = camera_to_world.to(torch.float64)
    centre = _focus(poses)
    rotation = turn_up(_up(poses))
    offset = poses[:, :3, 3] - centre
    distance = torch.linalg.vector_norm(offset, dim=-1)
    _check_in_front((offset * poses[:, :3, 2]).sum(-1))
    radius = float((distance * torch.tensor([_sine_of_view(each) for each in intrinsics])).quantile(0.5))
    inside = int(distance.argmin())
    if distance[inside] < radius:
        raise PoseError(
            f"photo {inside}: its camera is {distance[inside]:.4g} from the point that the cameras look at, inside the "
            f"ball of radius {radius:.4g} that the photos show; remove photos taken from within the object"
        )
    return Similarity(1.0 / radius, rotation, -rotation @ centre / radius)


def _focus(poses: Tensor) -> Tensor:
    """The point [3] nearest, in least squares, to all optical axes."""
    axis = poses[:, :3, 2]
    across = torch.eye(3, dtype=torch.float64) - axis[:, :, None] * axis[:, None, :]  # [N, 3, 3], projections
    normal = across.mean(0)
    if torch.linalg.eigvalsh(normal)[0] < PARALLEL:
        raise PoseError(
            f"all {len(poses)} cameras look in the same direction, so that nothing says where the object is; "
            "photograph it from several sides"
        )
    return torch.linalg.solve(normal, (across @ poses[:, :3, 3:]).mean(0)[:, 0])


def _up(poses: Tensor) -> Tensor:
    """The capture's unit vertical [3]: across the cameras' x axes, which are held level, on the side of their y axes.

    Where the x axes do not span a plane (cameras in one vertical plane), the mean of the y axes.
    """
    right, mean_up = poses[:, :3, 0], poses[:, :3, 1].mean(0)
    spread, directions = torch.linalg.eigh(right.T @ right / len(poses))  # ascending
    if spread[1] < LEVEL:
        return mean_up / torch.linalg.vector_norm(mean_up)
    level = directions[:, 0]
    lean = mean_up @ level
    if lean.abs() < 1e-9:  # all look straight down: from above, then
        lean = poses[:, :3, 2].mean(0) @ level
    return level * torch.where(lean < 0, -1.0, 1.0)


def turn_up(up: Tensor) -> Tensor:
    """The rotation [3, 3] by the smallest angle that takes the unit vector `up` to +z."""
    x, y, z = up.tolist()
    if z < -1.0 + 1e-12:
        return torch.diag(torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    cross = torch.tensor([[0.0, 0.0, -x], [0.0, 0.0, -y], [x, y, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + cross + cross @ cross / (1.0 + z)  # Rodrigues


def _check_in_front(depth: Tensor) -> None:
    behind = int((depth <= 0).sum())
    if behind:
        raise PoseError(
            f"photo {int((depth <= 0).nonzero()[0])}: its camera looks away from the point that all cameras together "
            f"look at ({behind} of {len(depth)} do); the photos must show one object from outside, and poses must be "
            "camera-to-world with OpenGL axes"
        )


def _sine_of_view(camera: Intrinsics) -> float:
    """Sine of half the angle of view along the picture's longer side."""
    half = max(camera.width / (2.0 * camera.fx), camera.height / (2.0 * camera.fy))
    return half / (1.0 + half * half) ** 0.5
