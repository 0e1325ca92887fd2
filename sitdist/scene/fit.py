"""Fit a voxel field to posed photos of one object before a plain background: coarse to fine, in plain torch.

Source: Sun et al., "Direct voxel grid optimization", 2022 (coarse to fine, then a box tight about the object);
Fridovich-Keil et al., "Plenoxels", 2022 (total variation). Photos that show scenery behind the object need an alpha
channel: all that lies outside the box is of one colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics, camera_rays, full_turn, orbit
from sitdist.geometry.similarity import Similarity, capture_frame
from sitdist.io.files import require_memory
from sitdist.scene.grid import VoxelField
from sitdist.scene.store import Scene, render_field
from sitdist.scene.views import border_pixels
from sitdist.scene.volume import box_interval, march_occupied

Measure = Callable[[Tensor, Tensor], Tensor]  # pictures and true pictures [B, 3, H, W] -> [B]

HELD_OUT = 10  # every tenth photo, the first among them, is measured and not fitted
FEWEST = 3  # photos: two to fit, one to measure
DENSITY_SCALE = 30.0  # per unit of length in the unit frame
THIN = -6.0  # density before its softplus where nothing is known: a whole ray through it loses a tenth
SOLID = 0.1  # what is solid absorbs at least this along a voxel
MARGIN = 2  # voxels of the first grid kept around what is solid
LOOK = 100  # steps between two looks at which cells are empty
MEASURE = 200  # steps between two measurements on the photos held out
VARIATION_EVERY = 2  # steps: total variation changes slowly and its gradient visits the whole grid
LAST_RATE = 0.05  # of the learning rate, at the end of its cosine
TURNTABLE = (2, 6)  # rows and columns of the contact sheet
TURNTABLE_SIDE = 256  # pixels: its views are at most this large


@dataclass(frozen=True)
class Photos:
    """N posed photos of one size: images [N, 3, H, W], uint8 or float32 in [0, 1], camera_to_world [N, 4, 4] float64.

    `fingerprint` is a SHA-256 of everything they were read from. Where every photo has alpha, `opacity` is it, uint8
    [N, H, W], and the images lie on `backdrop`.
    """

    images: Tensor
    camera_to_world: Tensor
    intrinsics: Sequence[Intrinsics]
    fingerprint: str = ""
    opacity: Tensor | None = None
    backdrop: tuple[float, float, float] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pictures(self, indices: Sequence[int]) -> Tensor:
        """These photos as float32 [B, 3, H, W] in [0, 1]."""
        return _unit_range(self.images[list(indices)])

    def thinned(self, count: int | None) -> Photos:
        """`count` of them, evenly spaced; all of them for None, or where there are no more."""
        if count is None or count >= len(self):
            return self
        kept = [index * len(self) // count for index in range(count)]
        cameras = [self.intrinsics[index] for index in kept]
        return replace(
            self,
            images=self.images[kept],
            camera_to_world=self.camera_to_world[kept],
            intrinsics=cameras,
            fingerprint=f"{self.fingerprint}, {count} of {len(self)}",
            opacity=None if self.opacity is None else self.opacity[kept],
        )


@dataclass(frozen=True)
class FitOptions:
    """How a field is fitted; defaults are for about a hundred photos of 100 to 200 pixels a side.

    `resolutions`: at each level the grid has about the cube of this many voxels, of equal edges; `steps` at each.
    Total variation is the mean, over vertices and channels, of squared differences to the three neighbours: its
    weight against the photos' mean squared error, for density (`first_` on the first level), colour, and the slopes
    of view-dependent colour.
    """

    resolutions: tuple[int, ...] = (32, 64, 112)
    steps: tuple[int, ...] = (200, 300, 450)
    rays: int = 4096
    learning_rate: float = 0.1
    first_variation_density: float = 1e-3
    variation_density: float = 1e-4
    variation_colour: float = 1e-3
    variation_slopes: float = 3e-4
    view_dependent: bool = True
    background: tuple[float, float, float] | None = None  # None: the median colour of the photos' borders
    keep_frame: bool = False  # the scene's poses are in the capture's frame, not in the unit frame
    seed: int = 0

    def variation(self, channels: int, level: int) -> list[float]:
        """Weight of every channel's total variation at a level of the grid."""
        density = self.variation_density if level else self.first_variation_density
        colour = [self.variation_colour / 3] * 3
        return [density, *colour, *([self.variation_slopes / 9] * (channels - 4))]


def fit_scene(
    photos: Photos,
    options: FitOptions | None = None,
    measures: Mapping[str, Measure] | None = None,
    device: torch.device | str = "cpu",
) -> Scene:
    """The scene that the photos show; `measures` are taken on every tenth photo, which is not fitted, as it goes on.

    Equal for equal photos, options, device type and thread count (on a GPU up to the order of its sums). DataError for
    fewer than FEWEST photos, ConfigError for options at odds; PoseError where cameras do not stand around one object.
    """
    options = options or FitOptions()
    if len(options.resolutions) != len(options.steps):
        raise ConfigError(
            f"resolutions {list(options.resolutions)} and steps {list(options.steps)}: give one number of steps for "
            "each resolution"
        )
    if len(photos) < FEWEST:
        raise DataError(
            f"{len(photos)} photo{'s' * (len(photos) != 1)}: a field needs posed photos from all sides, at least "
            f"{FEWEST} and better some dozens; add photos"
        )
    finest, channels = max(options.resolutions), 13 if options.view_dependent else 4
    what = f"a grid of {finest}^3 voxels of {channels} numbers"
    require_memory(6 * 4 * channels * finest**3, what, "give smaller resolutions")
    similarity = capture_frame(photos.camera_to_world, photos.intrinsics)
    fit = _Fit(photos, similarity.cameras(photos.camera_to_world), options, measures or {}, torch.device(device))
    for level in range(len(options.resolutions)):
        fit.refine(level)
        fit.optimize(level)
    return _scene(fit, similarity)


class _Fit:
    """A field on its way: everything in the unit frame of the cameras."""

    def __init__(
        self,
        photos: Photos,
        camera_to_world: Tensor,
        options: FitOptions,
        measures: Mapping[str, Measure],
        device: torch.device,
    ) -> None:
        self.photos, self.options, self.measures, self.device = photos, options, measures, device
        self.camera_to_world = camera_to_world.to(device)
        self.opacity = None if photos.opacity is None else photos.opacity.to(device)
        self.rays = _Rays(photos.images.to(device), self.camera_to_world, photos.intrinsics)
        self.held_out = list(range(0, len(photos), HELD_OUT))
        self.training = [index for index in range(len(photos)) if index % HELD_OUT]
        self.generator = torch.Generator().manual_seed(options.seed)
        self.field = _empty_field(options, _background(photos, self.training, options.background), device)
        self.measured: dict[str, float] = {}

    def refine(self, level: int) -> None:
        """Go on to the next, finer grid; the second one is drawn tightly about what is solid on the first."""
        if level == 0:
            return
        box = _solid_box(self.field) if level == 1 else self.field.box
        self.field = self.field.resampled(box, _grid_shape(box, self.options.resolutions[level]))

    def optimize(self, level: int) -> None:
        """Adam on one grid, by random rays through its box."""
        values = self.field.values = torch.nn.Parameter(self.field.values.contiguous())
        optimizer = torch.optim.Adam([values], self.options.learning_rate, betas=(0.9, 0.99), eps=1e-15, fused=True)
        variation = self.options.variation(len(values), level)
        batches = self._batches(self.rays.through(self.field.box, self.training))
        name = "x".join(map(str, self.field.resolution))
        progress = tqdm(range(self.options.steps[level]), f"scene {name}", unit="step")
        for step in progress:
            optimizer.param_groups[0]["lr"] = self.options.learning_rate * self._rate(level, step)
            loss = self._loss(next(batches))
            optimizer.zero_grad()
            loss.backward()
            if step % VARIATION_EVERY == 0:
                add_variation_gradient(values, [VARIATION_EVERY * weight for weight in variation])
            optimizer.step()
            last = step + 1 == len(progress)
            if (step + 1) % LOOK == 0 or last:
                self.field.find_empty()
            if (step + 1) % MEASURE == 0 or last:
                self.measured = self.measure()
                progress.set_postfix({key: f"{value:.4g}" for key, value in self.measured.items()}, refresh=False)
        self.field.values = values.detach()

    def _rate(self, level: int, step: int) -> float:
        done = (sum(self.options.steps[:level]) + step) / sum(self.options.steps)
        return LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))

    def _loss(self, pixels: Tensor) -> Tensor:
        """Mean squared error of the colours of these pixels, each by one ray with stretches at random places."""
        origins, directions, colours = self.rays(pixels)
        offset = torch.rand(len(pixels), generator=self.generator).to(self.device)
        rendered = march_occupied(self.field, origins, directions, self.field.voxel, offset)
        background = self.field.background
        if self.opacity is not None:  # on a background of any colour, so that none is taken for a part of the object
            background = torch.rand(3, generator=self.generator).to(self.device)
            transparent = 1.0 - self.opacity.flatten()[pixels, None].float() / 255.0
            colours = colours + transparent * (background - self.field.background)
        return functional.mse_loss(rendered.on(background), colours)

    def _batches(self, pool: Tensor) -> Iterator[Tensor]:
        """Pixels [B] without end: the pool in one random order after another."""
        while True:
            order = torch.randperm(len(pool), generator=self.generator).to(self.device)
            yield from pool[order].split(self.options.rays)

    def measure(self) -> dict[str, float]:
        """The mean of every measure over the photos that are held out."""
        images = torch.stack(
            [
                render_field(self.field, self.camera_to_world[index], self.photos.intrinsics[index]).cpu()
                for index in self.held_out
            ]
        )
        true_images = self.photos.pictures(self.held_out)
        return {name: float(measure(images, true_images).mean()) for name, measure in self.measures.items()}


class _Rays:
    """The ray and the colour of every pixel; a pixel is one number over all photos, rows and columns."""

    def __init__(self, images: Tensor, camera_to_world: Tensor, intrinsics: Sequence[Intrinsics]) -> None:
        self.images, self.camera_to_world, self.intrinsics = images, camera_to_world, intrinsics
        self.pinhole = torch.tensor([each.to_list() for each in intrinsics], dtype=torch.float32, device=images.device)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Origins, unit directions and colours in [0, 1], [P, 3] each, of pixels [P]."""
        height, width = self.images.shape[-2:]
        photo, row, column = pixels // (height * width), pixels // width % height, pixels % width
        fx, fy, cx, cy = self.pinhole[photo].unbind(-1)
        x, y = (column + 0.5 - cx) / fx, -(row + 0.5 - cy) / fy
        in_camera = functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1), dim=-1)
        pose = self.camera_to_world[photo].float()
        directions = (pose[:, :3, :3] @ in_camera[..., None])[..., 0]
        return pose[:, :3, 3], directions, _unit_range(self.images[photo, :, row, column])

    def through(self, box: Tensor, photos: Sequence[int]) -> Tensor:
        """The pixels [P] of these photos whose rays meet the box."""
        pixels = []
        for photo in photos:
            origins, directions = camera_rays(self.camera_to_world[photo], self.intrinsics[photo])
            enter, leave = box_interval(box, origins.reshape(-1, 3).float(), directions.reshape(-1, 3).float())
            pixels.append((leave > enter).nonzero()[:, 0] + photo * len(enter))
        return torch.cat(pixels)


@torch.no_grad()
def add_variation_gradient(values: Tensor, weights: Sequence[float]) -> None:
    """Add to `values.grad`, [C, nz, ny, nx], the gradient of every channel's weighted total variation.

    Total variation: the mean over vertices of the squared differences to the next vertices along z, y and x.
    """
    assert values.grad is not None
    for channel, gradient, weight in zip(values, values.grad, weights, strict=True):
        factor = 2.0 * weight / channel.numel()
        for axis in range(3):
            difference = channel.diff(dim=axis)
            gradient.narrow(axis, 1, difference.shape[axis]).add_(difference, alpha=factor)
            gradient.narrow(axis, 0, difference.shape[axis]).sub_(difference, alpha=factor)


def _unit_range(images: Tensor) -> Tensor:
    """uint8 or float32 pictures as float32 in [0, 1]."""
    return images.float() / 255.0 if images.dtype == torch.uint8 else images


def _background(photos: Photos, training: Sequence[int], given: tuple[float, float, float] | None) -> Tensor:
    """The colour behind the object, [3]."""
    given = given if photos.backdrop is None else photos.backdrop
    if given is not None:
        return torch.tensor(given, dtype=torch.float32)
    border = _unit_range(border_pixels(photos.images[list(training)]))
    colour = border.median(0).values
    unlike = float(((border - colour).abs().amax(-1) > 0.1).float().mean())
    if unlike > 0.2:
        print(
            f"sitdist: {unlike:.0%} of the photos' border is not of the background's colour "
            f"{[round(each, 3) for each in colour.tolist()]}; mask the object (alpha) for a clean scene",
            flush=True,
        )
    return colour


def _empty_field(options: FitOptions, background: Tensor, device: torch.device) -> VoxelField:
    box = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    channels = 13 if options.view_dependent else 4
    values = torch.zeros(channels, *reversed(_grid_shape(box, options.resolutions[0])))
    values[0] = THIN
    return VoxelField(values.to(device), box.to(device), background.to(device), DENSITY_SCALE)


def _grid_shape(box: Tensor, resolution: int) -> tuple[int, int, int]:
    """Vertices along x, y, z of about resolution^3 voxels that are cubes but for rounding."""
    edges = (box[1] - box[0]).tolist()
    voxel = (edges[0] * edges[1] * edges[2]) ** (1.0 / 3.0) / resolution
    nx, ny, nz = (max(2, round(edge / voxel) + 1) for edge in edges)
    return nx, ny, nz


def _solid(field: VoxelField) -> Tensor:
    """Positions [P, 3] of the vertices that absorb at least SOLID along a voxel; DataError if there are none."""
    density = field.density_scale * functional.softplus(field.values[0])
    z, y, x = (density * field.voxel > SOLID).nonzero(as_tuple=True)
    if len(x) == 0:
        raise DataError(
            "the photos show nothing that is solid: the fit is empty; check that poses are camera-to-world with OpenGL "
            "axes, the focal length in pixels, and the background's colour"
        )
    count = torch.tensor(field.resolution, device=field.box.device) - 1
    return field.box[0] + torch.stack([x, y, z], -1) * ((field.box[1] - field.box[0]) / count)


def _solid_box(field: VoxelField) -> Tensor:
    """The box [2, 3] about what is solid, with a margin, within the field's own."""
    solid, margin = _solid(field), MARGIN * field.voxel
    low = torch.maximum(solid.amin(0) - margin, field.box[0])
    high = torch.minimum(solid.amax(0) + margin, field.box[1])
    return torch.stack([low, high])


def _scene(fit: _Fit, similarity: Similarity) -> Scene:
    """The fitted field, scaled so that what is solid fits the ball of radius 1 about the origin (but for 0.1%)."""
    field, options = fit.field, fit.options
    radius = float(torch.linalg.vector_norm(_solid(field), dim=-1).sort().values[-1 - len(_solid(field)) // 1000])
    field.box, field.density_scale = field.box / radius, field.density_scale * radius
    scaling = Similarity(1.0 / radius, Similarity.identity().rotation, Similarity.identity().translation)
    source = {"fingerprint": fit.photos.fingerprint, "photos": len(fit.photos), "options": asdict(options)}
    held_out = {**fit.measured, "views": float(len(fit.held_out))}
    return Scene(field, similarity.then(scaling), "capture" if options.keep_frame else "unit", held_out, source)


def turntable(scene: Scene, photos: Photos) -> Tensor:
    """Contact sheet [3, rows H, columns W]: the object from around, 20 degrees above, as far as its photos were."""
    rows, columns = TURNTABLE
    poses = scene.similarity.cameras(photos.camera_to_world)
    distance = float(torch.linalg.vector_norm(poses[:, :3, 3], dim=-1).quantile(0.5))
    camera, cameras = _at_most(photos.intrinsics[0], TURNTABLE_SIDE), orbit(full_turn(rows * columns), 20.0, distance)
    views = [render_field(scene.field, pose, camera, supersample=2) for pose in cameras]
    return torch.cat([torch.cat(views[row * columns : (row + 1) * columns], 2) for row in range(rows)], 1)


def _at_most(camera: Intrinsics, side: int) -> Intrinsics:
    """The same field of view in a picture that is no larger than `side` pixels, centred."""
    shrink = min(1.0, side / max(camera.width, camera.height))
    width, height = max(1, round(shrink * camera.width)), max(1, round(shrink * camera.height))
    return Intrinsics(shrink * camera.fx, shrink * camera.fy, 0.5 * width, 0.5 * height, width, height)
