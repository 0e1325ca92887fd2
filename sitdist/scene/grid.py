"""A radiance field on a dense voxel grid: trilinear between vertices, in a box, with a record of where it is empty.

Density and colour are activated after the interpolation, so that a surface may be sharper than a voxel.
Source: Sun et al., "Direct voxel grid optimization", 2022 (post-activated density); Fridovich-Keil et al.,
"Plenoxels", 2022 (view-dependent colour by low-order harmonics).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

SLOPE = 0.3  # of stored slopes: they learn this much slower than the colour itself at one learning rate
EMPTY = 1e-2  # a cell is empty where the densest of its corners absorbs less than this along a voxel


@dataclass
class VoxelField:
    """Values at the vertices of a grid that spans `box` [2, 3], lower and upper corner: the field is empty outside.

    `values` [C, nz, ny, nx]: density before its softplus, then colour before its sigmoid: 3 channels, or 12 where
    colour varies linearly with the direction of view (constant, then slopes along x, y, z). `density_scale` is per
    unit of length. `cells` [nz - 1, ny - 1, nx - 1] says which cells are not empty (None: not known, all).
    """

    values: Tensor
    box: Tensor
    background: Tensor
    density_scale: float
    cells: Tensor | None = None

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Vertices along x, y, z."""
        nz, ny, nx = self.values.shape[1:]
        return nx, ny, nz

    @property
    def voxel(self) -> float:
        """Length of a cell's edge (the mean of the three)."""
        cells = torch.tensor(self.resolution, device=self.box.device) - 1
        return float(((self.box[1] - self.box[0]) / cells).mean())

    def to(self, device: torch.device | str) -> VoxelField:
        """The same field on a device."""
        cells = None if self.cells is None else self.cells.to(device)
        return replace(
            self,
            values=self.values.to(device),
            box=self.box.to(device),
            background=self.background.to(device),
            cells=cells,
        )

    def density(self, points: Tensor) -> Tensor:
        """Density [P] at points [P, 3] within the box."""
        return self.density_scale * functional.softplus(self._sample(self.values[:1], points)[0])

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and colour [P, 3] at points [P, 3] within the box, seen along unit directions [P, 3]."""
        values = self._sample(self.values, points)  # [C, P]
        density = self.density_scale * functional.softplus(values[0])
        colour = values[1:4]
        if len(values) > 4:
            slopes = values[4:].reshape(3, 3, -1)  # [axis, colour, P]
            colour = colour + SLOPE * (slopes * directions.T[:, None]).sum(0)
        return density, torch.sigmoid(colour).T

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P], 0 outside the box, and colour [P, 3] as seen from above, at any points [P, 3]."""
        inside = ((points >= self.box[0]) & (points <= self.box[1])).all(-1)
        down = points.new_tensor([0.0, 0.0, -1.0]).expand_as(points)
        density, colour = self.radiance(points, down)
        return density * inside, colour

    def occupied(self, points: Tensor) -> Tensor:
        """Which of the points [P, 3] within the box are in cells that are not empty; bool [P]."""
        if self.cells is None:
            return torch.ones(len(points), dtype=torch.bool, device=points.device)
        nz, ny, nx = self.cells.shape
        count = torch.tensor([nx, ny, nz], device=points.device)
        place = (points - self.box[0]) * (count / (self.box[1] - self.box[0]))
        x, y, z = torch.minimum(place.to(torch.int32).clamp_min(0), count.to(torch.int32) - 1).unbind(-1)
        return self.cells.reshape(-1)[(z * ny + y) * nx + x]

    def find_empty(self) -> None:
        """Look again which cells are empty; a cell next to one that is not counts as not empty, so that it can fill."""
        with torch.no_grad():
            density = self.density_scale * functional.softplus(self.values[:1])
            densest = functional.max_pool3d(density, 2, stride=1)  # interpolation never exceeds the densest corner
            full = (densest * self.voxel > EMPTY).float()
            self.cells = functional.max_pool3d(full, 3, stride=1, padding=1)[0] > 0

    def resampled(self, box: Tensor, resolution: tuple[int, int, int]) -> VoxelField:
        """The same field on another grid, no larger than this one; which cells are empty is looked up anew."""
        axes = [
            torch.linspace(0.0, 1.0, n, device=box.device) * (high - low) + low
            for n, low, high in zip(resolution, box[0], box[1], strict=True)
        ]
        z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
        points = torch.stack([x, y, z], -1)
        with torch.no_grad():
            values = self._sample(self.values, points.reshape(-1, 3)).reshape(-1, *points.shape[:3])
        field = VoxelField(values, box, self.background, self.density_scale)
        field.find_empty()
        return field

    def _sample(self, values: Tensor, points: Tensor) -> Tensor:
        """Trilinear interpolation of values [C, nz, ny, nx] at points [P, 3]: [C, P]."""
        place = (points - self.box[0]) * (2.0 / (self.box[1] - self.box[0])) - 1.0
        sampled = functional.grid_sample(
            values[None], place[None, None, None], padding_mode="border", align_corners=True
        )
        return sampled[0, :, 0, 0]
