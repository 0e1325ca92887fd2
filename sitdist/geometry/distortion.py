"""Lens distortion: the camera models of OpenCV and COLMAP, and pictures resampled to a pinhole camera.

Points are normalized: x right, y down, at distance 1 before the camera. A pinhole camera shows (x, y) at the pixel
(fx x + cx, fy y + cy); a lens shows it where the pinhole camera shows `distort((x, y))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics

STEEPEST_DEG = 89.5  # angle to the optical axis up to which points are mapped; a pinhole camera sees less than 90
TABLE = 20_000  # entries
NEWTON_STEPS = 20
TOLERANCE = 1e-10  # of an undistorted point, distorted again
ROWS = 256  # of a picture, resampled at a time


@dataclass(frozen=True)
class Distortion:
    """How a lens moves points, by the words of OpenCV's and COLMAP's documentation.

    `perspective` has `radial` = (k1, k2, ..., k6), all or the first ones, and `tangential` = (p1, p2). `fisheye` has
    `radial` = (k1, ..., k4). `fov` has `radial` = (omega,), in radians (Devernay and Faugeras, "Straight lines have to
    be straight", 2001).
    """

    kind: Literal["perspective", "fisheye", "fov"]
    radial: tuple[float, ...]
    tangential: tuple[float, float] = (0.0, 0.0)

    def distort(self, points: Tensor) -> Tensor:
        """Where the lens shows points [..., 2] (float64) that a pinhole camera shows elsewhere."""
        x, y = points.unbind(-1)
        squared = x.square() + y.square()  # r^2
        scale = self._radial(squared)
        # OpenCV, "Camera Calibration and 3D Reconstruction"
        p1, p2 = self.tangential
        return torch.stack(
            [
                scale * x + 2.0 * p1 * x * y + p2 * (squared + 2.0 * x.square()),
                scale * y + p1 * (squared + 2.0 * y.square()) + 2.0 * p2 * x * y,
            ],
            dim=-1,
        )

    def undistort(self, points: Tensor) -> Tensor:
        """The points [..., 2] (float64) that `distort` takes to `points`; NaN where there are none."""
        radius, distorted = self._table
        given = points.to(torch.float64)
        length = torch.linalg.vector_norm(given, dim=-1)
        index = torch.searchsorted(distorted, length.contiguous()).clamp(1, len(radius) - 1)
        share = (length - distorted[index - 1]) / (distorted[index] - distorted[index - 1])
        start = radius[index - 1] + share.clamp(0.0, 1.0) * (radius[index] - radius[index - 1])
        found = given * (start / length.clamp_min(1e-300))[..., None]
        unit = torch.eye(2, dtype=torch.float64)
        for _ in range(NEWTON_STEPS):
            columns = [
                torch.func.jvp(self.distort, (found,), (direction.expand_as(found).contiguous(),)) for direction in unit
            ]
            error = columns[0][0] - given
            (a, c), (b, d) = (column[1].unbind(-1) for column in columns)  # the Jacobian [[a, b], [c, d]]
            step = torch.stack([d * error[..., 0] - b * error[..., 1], a * error[..., 1] - c * error[..., 0]], dim=-1)
            found = found - step / (a * d - b * c)[..., None]
            if not bool((step.abs() > 1e-14 * (1.0 + found.abs())).any()):
                break
        error = torch.linalg.vector_norm(self.distort(found) - given, dim=-1)
        good = (error <= TOLERANCE * (1.0 + length)) & self.reaches(found)
        return torch.where(good[..., None], found, math.nan)

    def reaches(self, points: Tensor) -> Tensor:
        """Whether points [..., 2] are within the radius up to which the lens keeps their order, bool [...].

        Beyond it a polynomial turns back, and shows points where the lens shows others.
        """
        return torch.linalg.vector_norm(points, dim=-1) <= self.largest_radius

    @property
    def largest_radius(self) -> float:
        """The radius up to which `reaches` holds."""
        return float(self._table[0][-1])

    def _radial(self, squared: Tensor) -> Tensor:
        """What the radius is multiplied by, at r^2 [...]."""
        if self.kind == "perspective":
            k1, k2, k3, k4, k5, k6 = (*self.radial, *[0.0] * 6)[:6]
            above = 1.0 + squared * (k1 + squared * (k2 + squared * k3))
            return above / (1.0 + squared * (k4 + squared * (k5 + squared * k6)))
        r = squared.clamp_min(1e-20).sqrt()  # the limit at 0, to double precision
        if self.kind == "fisheye":
            theta = r.atan()
            powers = theta.square()
            k1, k2, k3, k4 = (*self.radial, *[0.0] * 4)[:4]
            return theta / r * (1.0 + powers * (k1 + powers * (k2 + powers * (k3 + powers * k4))))
        omega = self.radial[0]
        if abs(omega) < 1e-6:
            return torch.ones_like(squared)
        return (2.0 * r * math.tan(0.5 * omega)).atan() / (r * omega)

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """Radii [n], ascending from 0, and the distorted ones [n], ascending as far as they do; DataError."""
        radius = torch.linspace(0.0, math.radians(STEEPEST_DEG), TABLE, dtype=torch.float64).tan()
        distorted = radius * self._radial(radius.square())
        rising = distorted[1:] > distorted[:-1]  # False for NaN, too
        count = TABLE if bool(rising.all()) else 1 + int(rising.int().argmin())
        if radius[count - 1] < 1e-3:
            raise DataError(
                f"{self.kind} distortion {self.radial}: folds the picture about its middle; correct the coefficients"
            )
        return radius[:count], distorted[:count]


def undistorted(picture: Tensor, camera: Intrinsics, distortion: Distortion) -> tuple[Tensor, Tensor]:
    """What the pinhole camera `camera` sees, [C, H, W], of a picture [C, H, W] through a lens, by bicubic sampling.

    Values are clamped to [0, 1]. The second result [H, W], float32, is 1 where the pixel comes from the picture and 0
    where it comes from outside; there the first is 0. A picture with alpha must be colour times alpha.
    """
    size = picture.new_tensor([camera.width, camera.height], dtype=torch.float64)
    focal = size.new_tensor([camera.fx, camera.fy])
    centre = size.new_tensor([camera.cx, camera.cy])
    column = torch.arange(camera.width, dtype=torch.float64) + 0.5
    pictures, insides = [], []
    for rows in (torch.arange(camera.height, dtype=torch.float64) + 0.5).split(ROWS):
        y, x = torch.meshgrid(rows, column, indexing="ij")
        points = (torch.stack([x, y], dim=-1) - centre) / focal
        pixel = distortion.distort(points) * focal + centre
        inside = distortion.reaches(points) & ((pixel >= 0.0) & (pixel <= size)).all(dim=-1)
        place = torch.where(inside[..., None], 2.0 * pixel / size - 1.0, 0.0).to(picture.dtype)
        sampled = functional.grid_sample(
            picture[None], place[None], mode="bicubic", padding_mode="border", align_corners=False
        )
        pictures.append(sampled[0].clamp(0.0, 1.0) * inside)
        insides.append(inside.float())
    return torch.cat(pictures, dim=1), torch.cat(insides)
