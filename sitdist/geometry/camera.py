"""Cameras: the one convention for poses, where cameras stand, and the ray through every pixel.

A pose is `camera_to_world`, [..., 4, 4]: OpenGL axes (x right, y up, the camera looks down its own -z) in a world whose
+z is up. Pixels have their centres at half integers; the image's first row is its top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from sitdist.errors import DataError

MAX_PIXELS = 89_478_485  # of a picture; Pillow warns of a decompression bomb beyond
FOCAL_RANGE = (1e-3, 1e6)  # focal lengths, in widths or heights of the picture
MAX_OFFSET = 1e3  # of the principal point from the middle of the picture, in its widths or heights


@dataclass(frozen=True)
class Intrinsics:
    """Pinhole camera: focal lengths and principal point in pixels, for pictures of `width` x `height` pixels."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    @classmethod
    def from_fov(cls, fov_deg: float, width: int, height: int) -> Intrinsics:
        """Square pixels, centred, with a horizontal field of view of `fov_deg` degrees."""
        focal = 0.5 * width / math.tan(0.5 * math.radians(fov_deg))
        return cls(focal, focal, 0.5 * width, 0.5 * height, width, height)

    def scaled(self, factor: int) -> Intrinsics:
        """The same camera with every pixel cut into factor^2."""
        fx, fy, cx, cy = (factor * value for value in self.to_list())
        return Intrinsics(fx, fy, cx, cy, factor * self.width, factor * self.height)

    def shrunk(self, factor: int) -> Intrinsics:
        """The camera of the same picture with factor^2 pixels made one; what is left at the right and below is cut."""
        width, height = self.width // factor, self.height // factor
        return Intrinsics(self.fx / factor, self.fy / factor, self.cx / factor, self.cy / factor, width, height)

    def normalized(self) -> list[float]:
        """[fx / width, fy / height, cx / width, cy / height], the same for a picture of any size."""
        return [self.fx / self.width, self.fy / self.height, self.cx / self.width, self.cy / self.height]

    def to_list(self) -> list[float]:
        """[fx, fy, cx, cy] in pixels."""
        return [self.fx, self.fy, self.cx, self.cy]


def check_intrinsics(intrinsics: Intrinsics, name: str) -> None:
    """DataError, naming `name`, unless they are a pinhole camera's: finite numbers within the bounds above."""
    width, height = intrinsics.width, intrinsics.height
    values = [*intrinsics.to_list(), width, height]
    if not all(isinstance(value, Real) and -1e300 < value < 1e300 for value in values):
        raise DataError(f"{name}: fx, fy, cx, cy, width, height are {values}; expected finite numbers")
    if min(width, height) < 1 or width % 1 or height % 1 or width * height > MAX_PIXELS:
        raise DataError(
            f"{name}: a camera for {width:.12g}x{height:.12g} pixels; expected whole numbers above 0, and at most "
            f"{MAX_PIXELS:,} pixels in all"
        )
    for focal, centre, size in ((intrinsics.fx, intrinsics.cx, width), (intrinsics.fy, intrinsics.cy, height)):
        low, high = (bound * size for bound in FOCAL_RANGE)
        if not low <= focal <= high:
            raise DataError(f"{name}: focal length {focal:g} for {size} pixels; expected {low:g} to {high:g} pixels")
        if abs(centre - 0.5 * size) > MAX_OFFSET * size:
            raise DataError(f"{name}: principal point {centre:g} for {size} pixels is far outside; give it in pixels")


def camera_radius(camera_to_world: Tensor) -> Tensor:
    """Distance of the camera to the world's origin, [...]."""
    return torch.linalg.vector_norm(camera_to_world[..., :3, 3], dim=-1)


def looks_at_origin(camera_to_world: Tensor) -> Tensor:
    """Whether the optical axis of each camera [N, 4, 4] meets the origin, in front of it, to 1e-4 of its distance."""
    backward, position = camera_to_world[:, :3, 2], camera_to_world[:, :3, 3]
    distance = (position * backward).sum(-1)  # of the origin, along the line of sight
    beside = torch.linalg.vector_norm(position - distance[:, None] * backward, dim=-1)
    return (beside <= 1e-4 * camera_radius(camera_to_world)) & (distance > 0)


def is_upright(camera_to_world: Tensor) -> Tensor:
    """Whether the x axis of each camera [N, 4, 4] is level and its y axis does not point down, to 1e-4."""
    right, up = camera_to_world[:, :3, 0], camera_to_world[:, :3, 1]
    return (right[:, 2].abs() <= 1e-4) & (up[:, 2] >= -1e-4)


def look_at(position: Tensor, target: Sequence[float] | Tensor = (0.0, 0.0, 0.0)) -> Tensor:
    """Upright camera_to_world [..., 4, 4] (float64) of cameras at `position` [..., 3] that look at `target` [..., 3].

    Straight above or below the target, where "upright" says nothing, the camera's x axis is the world's +x or -x.
    """
    position = position.to(torch.float64)
    backward = position - torch.as_tensor(target, dtype=torch.float64, device=position.device)
    backward = backward / torch.linalg.vector_norm(backward, dim=-1, keepdim=True)  # [..., 3], the camera's +z
    up = torch.zeros_like(backward)
    up[..., 2] = 1.0
    at_pole = backward[..., :2].square().sum(-1, keepdim=True) < 1e-18
    up = torch.where(at_pole, up.roll(-1, -1), up)  # +y
    right = torch.linalg.cross(up, backward)
    right = right / torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    camera_to_world = torch.zeros(*position.shape[:-1], 4, 4, dtype=torch.float64, device=position.device)
    camera_to_world[..., :3, 0] = right
    camera_to_world[..., :3, 1] = torch.linalg.cross(backward, right)
    camera_to_world[..., :3, 2] = backward
    camera_to_world[..., :3, 3] = position
    camera_to_world[..., 3, 3] = 1.0
    return camera_to_world


def orbit(
    azimuth_deg: Tensor,
    elevation_deg: Tensor | float,
    radius: Tensor | float,
    roll_deg: Tensor | float = 0.0,
    target: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
) -> Tensor:
    """Cameras [..., 4, 4] (float64) at azimuths [...] about `target`, which they look at.

    Azimuth runs from +x towards +y, elevation is above the horizon. `roll_deg` turns each camera about its line of
    sight, counterclockwise as it sees; 0 is upright. All numbers broadcast.
    """
    azimuth = azimuth_deg.to(torch.float64).deg2rad()
    elevation = torch.as_tensor(elevation_deg).to(azimuth).deg2rad().expand_as(azimuth)
    direction = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], -1)
    target = torch.as_tensor(target).to(azimuth)
    cameras = look_at(target + torch.as_tensor(radius).to(azimuth).expand_as(azimuth)[..., None] * direction, target)
    return rolled(cameras, torch.as_tensor(roll_deg).to(azimuth).expand_as(azimuth))


def full_turn(views: int) -> Tensor:
    """Azimuths [views] in degrees, float64, evenly spaced on a closed circle."""
    return torch.arange(views, dtype=torch.float64) * (360.0 / views)


def shell_cameras(
    uniforms: Tensor,
    radius: tuple[float, float],
    elevation_deg: tuple[float, float] = (0.0, 90.0),
    azimuth_deg: tuple[float, float] = (0.0, 360.0),
) -> Tensor:
    """Cameras on a shell about the origin, looking at it: camera_to_world [N, 4, 4] (float64).

    `uniforms` [N, 3] are uniform numbers in (0, 1), for view i `draws.uniform(seed, "cameras", i, 3)`. Directions are
    uniform in area, the radius is uniform in `radius`.
    """
    low, high = (torch.full_like(uniforms[:, 0], edge) for edge in radius)
    return look_at(shell_positions(uniforms, low, high, elevation_deg, azimuth_deg))


def shell_positions(
    uniforms: Tensor,
    low: Tensor,
    high: Tensor,
    elevation_deg: tuple[float, float] = (-90.0, 90.0),
    azimuth_deg: tuple[float, float] = (0.0, 360.0),
) -> Tensor:
    """Points [N, 3] (float64) about the origin: radii uniform in [low, high], [N] each, directions uniform in area.

    `uniforms` [N, 3] in (0, 1) place azimuth (degrees from +x towards +y), elevation (above the horizon) and radius.
    """
    start, stop = (math.radians(angle) for angle in azimuth_deg)
    bottom, top = (math.sin(math.radians(angle)) for angle in elevation_deg)
    azimuth = start + (stop - start) * uniforms[:, 0]
    z = bottom + (top - bottom) * uniforms[:, 1]  # Archimedes: height is uniform in area
    ring = (1.0 - z.square()).clamp_min(0.0).sqrt()
    direction = torch.stack([ring * azimuth.cos(), ring * azimuth.sin(), z], dim=-1)  # [N, 3]
    return (low + (high - low) * uniforms[:, 2])[:, None] * direction


def rolled(camera_to_world: Tensor, angle_deg: Tensor) -> Tensor:
    """Cameras [..., 4, 4] turned about their line of sight by angles [...] in degrees, counterclockwise as they see."""
    angle = angle_deg.to(torch.float64).deg2rad()[..., None]
    right, up = camera_to_world[..., :3, 0], camera_to_world[..., :3, 1]
    turned = camera_to_world.clone()
    turned[..., :3, 0] = angle.cos() * right + angle.sin() * up
    turned[..., :3, 1] = angle.cos() * up - angle.sin() * right
    return turned


def camera_rays(camera_to_world: Tensor, intrinsics: Intrinsics) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, [..., H, W, 3] each, of the rays through all pixel centres, in the world's frame."""
    column = torch.arange(intrinsics.width).to(camera_to_world) + 0.5
    row = torch.arange(intrinsics.height).to(camera_to_world) + 0.5
    x = ((column - intrinsics.cx) / intrinsics.fx).expand(intrinsics.height, -1)
    y = (-(row - intrinsics.cy) / intrinsics.fy)[:, None].expand(-1, intrinsics.width)
    in_camera = torch.stack([x, y, -torch.ones_like(x)], dim=-1)  # [H, W, 3]
    directions = torch.einsum("...ij,hwj->...hwi", camera_to_world[..., :3, :3], in_camera)
    directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    origins = camera_to_world[..., None, None, :3, 3].expand_as(directions)
    return origins, directions
