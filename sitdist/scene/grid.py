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

from sitdist.scene.volume import NEAR

SLOPE = 0.3  # of stored slopes: they learn this much slower than the colour itself at one learning rate
EMPTY = 1e-2  # a cell is empty where the densest of its corners absorbs less than this along a voxel


@dataclass
class VoxelField:
    """Values at the vertices of a grid that spans `box` [2, 3], lower and upper corner: the field is empty outside.

    `values` [C, nz, ny, nx]: density before its softplus, then colour before its sigmoid: 3 channels, or 12 where
    colour varies linearly with the direction of view (constant, then slopes along x, y, z). `density_scale` is per
    unit of length. `cells` [nz - 1, ny - 1, nx - 1] says which cells are not empty (None: not known, all), and `near`,
    which follows from it, which have one within NEAR cells. `rows` [nz ny nx, C] are the values by vertices, of a field
    that is only rendered: they are read in a quarter of the time.
    """

    values: Tensor
    box: Tensor
    background: Tensor
    density_scale: float
    cells: Tensor | None = None
    near: Tensor | None = None
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cells is not None and self.near is None:
            self.near = _dilated(self.cells, NEAR)

    @property
    def resolution(self) -> tuple[int, int, int]:
        """Vertices along x, y, z."""
        nz, ny, nx = self.values.shape[1:]
        return nx, ny, nz

    @property
    def voxel(self) -> float:
        """Length of a cell's edge (the mean of the three)."""
        return sum(1.0 / each for each in self._cells_per_length()) / 3

    @property
    def edge(self) -> float:
        """The shortest edge of a cell."""
        return 1.0 / max(self._cells_per_length())

    def _cells_per_length(self) -> list[float]:
        return [
            (n - 1) / (high - low) for n, low, high in zip(self.resolution, *self.box.double().tolist(), strict=True)
        ]

    def to(self, device: torch.device | str) -> VoxelField:
        """The same field on a device."""
        cells, near, rows = (None if each is None else each.to(device) for each in (self.cells, self.near, self.rows))
        values, box, background = (each.to(device) for each in (self.values, self.box, self.background))
        return replace(self, values=values, box=box, background=background, cells=cells, near=near, rows=rows)

    def frozen(self) -> VoxelField:
        """The same field, to be rendered only."""
        return replace(self, rows=self.values.detach().permute(1, 2, 3, 0).reshape(-1, len(self.values)).contiguous())

    def density(self, points: Tensor) -> Tensor:
        """Density [P] at points [P, 3] within the box."""
        return self.density_scale * functional.softplus(self._sample(self.values[:1], points)[0])

    def radiance(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P] and colour [P, 3] at points [P, 3] within the box, seen along unit directions [P, 3]."""
        values = self._sample(self.values, points).T if self.rows is None else self._sample_rows(points)  # [P, C]
        density = self.density_scale * functional.softplus(values[:, 0])
        colour = values[:, 1:4]
        if values.shape[1] > 4:
            for axis, slopes in enumerate(values[:, 4:].split(3, 1)):  # [P, colour]
                colour = colour + slopes * (SLOPE * directions[:, axis, None])
        return density, torch.sigmoid(colour)

    def __call__(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Density [P], 0 outside the box, and colour [P, 3] as seen from above, at any points [P, 3]."""
        inside = ((points >= self.box[0]) & (points <= self.box[1])).all(-1)
        down = points.new_tensor([0.0, 0.0, -1.0]).expand_as(points)
        density, colour = self.radiance(points, down)
        return density * inside, colour

    def occupied(self, x: Tensor, y: Tensor, z: Tensor, near: bool = False) -> Tensor:
        """Which of the points, by coordinates [...], are in cells that are not empty; bool [...].

        With `near`, which of them have such a cell within NEAR cells; points outside the box count as on its border.
        """
        cells = self.near if near else self.cells
        if cells is None:
            return torch.ones(x.shape, dtype=torch.bool, device=x.device)
        index = torch.zeros((), dtype=torch.int32, device=x.device)
        low, per_length = self.box[0].tolist(), self._cells_per_length()
        for axis, coordinate in ((2, z), (1, y), (0, x)):
            count = cells.shape[2 - axis]
            place = ((coordinate - low[axis]) * per_length[axis]).clamp(0, count - 1).to(torch.int32)
            index = index * count + place
        return cells.reshape(-1)[index]

    def find_empty(self) -> None:
        """Look again which cells are empty; a cell next to one that is not counts as not empty, so that it can fill."""
        with torch.no_grad():
            density = self.density_scale * functional.softplus(self.values[:1])
            densest = functional.max_pool3d(density, 2, stride=1)  # interpolation never exceeds the densest corner
            full = densest * self.voxel > EMPTY
            self.cells = _dilated(full[0] > 0, 1)
            self.near = _dilated(self.cells, NEAR)

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

    def _sample_rows(self, points: Tensor) -> Tensor:
        """The same of all values, [P, C], from `rows`: a weighted sum of eight of them for every point."""
        assert self.rows is not None
        low, per_length = self.box[0].tolist(), self._cells_per_length()
        base = torch.zeros((), dtype=torch.int32, device=points.device)  # the vertex before each point, along all axes
        corners = torch.zeros(1, dtype=torch.int32, device=points.device)  # from there to the others
        weights = torch.ones(1, len(points), device=points.device)
        for axis in (2, 1, 0):
            count = self.resolution[axis]
            place = ((points[:, axis] - low[axis]) * per_length[axis]).clamp(0, count - 1)
            before = place.clamp(max=count - 2).to(torch.int32)
            after = place - before
            base = base * count + before
            corners = (corners * count)[:, None].add(torch.arange(2, device=points.device, dtype=torch.int32)).flatten()
            weights = torch.stack([weights * (1.0 - after), weights * after], 1).flatten(0, 1)  # [corner, P]
        return functional.embedding_bag(
            base[:, None] + corners, self.rows, per_sample_weights=weights.T.contiguous(), mode="sum"
        )


def _dilated(cells: Tensor, reach: int) -> Tensor:
    """Which cells have one of `cells` within `reach` to every side, bool [nz, ny, nx]."""
    full = cells.float()[None]
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * reach + 1, reach
        full = functional.max_pool3d(full, kernel, stride=1, padding=padding)
    return full[0] > 0
