"""The views of an evaluation: which there are, how they are cut into work units, and their data.

A unit is a chunk of at most `batch` views of one radius bin. The list of units follows from the views alone, never from
the number of processes, so a killed evaluation goes on with the units that are not on disk yet, on any number of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sitdist.config.recipe import SceneSource
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError, DataError
from sitdist.evaluate.measures import BINS_AT_MOST, EDGE, ViewRecord
from sitdist.evaluate.metrics import background_colour
from sitdist.geometry.camera import Intrinsics, camera_radius
from sitdist.geometry.similarity import Similarity
from sitdist.inference.preprocess import Preprocess, framed
from sitdist.model.codec import Codec, latent_mean
from sitdist.scene.photos import read_photos
from sitdist.scene.views import backdrop, border_pixels, evaluation_cameras, look, open_scene, render

PICTURES_PER_BIN = 4
WORST_PER_UNIT = 2


@dataclass(frozen=True)
class ViewRef:
    """One view to evaluate: its key, its position (keys its noise), its radius, and the bin [bin, bin + 1) of it."""

    key: str
    position: int
    radius: float
    bin: int


@dataclass(frozen=True)
class Unit:
    """Views of one bin that are evaluated as one batch; the first `pictures` of them also leave their pictures."""

    number: int
    views: tuple[ViewRef, ...]
    pictures: int

    @property
    def name(self) -> str:
        return f"unit_{self.number:05d}"


def radius_bins(radii: list[float], limits: tuple[int, int] | None) -> tuple[list[int | None], tuple[int, int]]:
    """The unit bin [a, a + 1) of every radius and the whole range (a, b); the last bin holds its upper edge too.

    With `limits` = (a, b), radii outside [a, b] have no bin (None); without, the range is the smallest that holds all.
    DataError for more than BINS_AT_MOST bins.
    """
    if limits is None:
        low = math.floor(min(radii) + EDGE)
        limits = (low, max(low + 1, math.ceil(max(radii) - EDGE)))
    low, high = limits
    if high - low > BINS_AT_MOST:
        raise DataError(
            f"radii {low} to {high}: more than {BINS_AT_MOST:,} bins of width 1; give a range by --radii A:B"
        )
    bins: list[int | None] = []
    for radius in radii:
        inside = low - EDGE <= radius <= high + EDGE
        bins.append(min(max(math.floor(radius + EDGE), low), high - 1) if inside else None)
    return bins, limits


def make_units(views: list[ViewRef], batch: int) -> list[Unit]:
    """Chunks of at most `batch` views, bin after bin in the order of the bins, views in the given order."""
    units: list[Unit] = []
    for bin_ in sorted({view.bin for view in views}):
        inside = [view for view in views if view.bin == bin_]
        for start in range(0, len(inside), batch):
            chunk = tuple(inside[start : start + batch])
            units.append(Unit(len(units), chunk, min(max(PICTURES_PER_BIN - start, 0), len(chunk))))
    return units


def thinned(views: list[ViewRef], at_most: int | None) -> list[ViewRef]:
    """At most so many of the views, as evenly over the bins as can be: the first of every bin; None: all of them."""
    if at_most is None or len(views) <= at_most:
        return views
    seen: dict[int, int] = {}
    ranked = []
    for view in views:
        seen[view.bin] = seen.get(view.bin, 0) + 1
        ranked.append((seen[view.bin], view.bin, view.key))
    kept = {key for _, _, key in sorted(ranked)[:at_most]}
    return [view for view in views if view.key in kept]


def pictured(unit: Unit, records: list[ViewRecord]) -> list[int]:
    """Which of a unit's views leave their pictures: the first ones, and those with the largest errors."""
    ranked = sorted(range(len(records)), key=lambda i: -records[i].rank)
    return sorted({*range(unit.pictures), *ranked[:WORST_PER_UNIT]})


def merge_pictures(arrays: dict[str, dict[str, np.ndarray]], units: list[Unit]) -> dict[str, np.ndarray]:
    """key [N], bin [N], and true and rendered [N, H, W, 3] uint8 of the views that were kept, in unit order.

    `arrays`: what every unit left, by its name. There is no `rendered` where nothing was.
    """
    parts: dict[str, list[np.ndarray]] = {"key": [], "bin": [], "true": [], "rendered": []}
    for unit in units:
        for name, array in arrays[unit.name].items():
            parts[name].append(array)
        parts["bin"].append(np.full(len(arrays[unit.name]["key"]), unit.views[0].bin))
    return {name: np.concatenate(values) for name, values in parts.items() if values}


VIEWS_PER_BIN_AT_MOST = 1_000_000
BACKGROUND_VIEWS = 64  # looked at for the colour behind the object


@dataclass(frozen=True)
class ViewBatch:
    """Pictures [B, 3, H, W] in [0, 1], latent moments [B, 2C, h, w], camera_to_world [B, 4, 4] float64, labels [B], and
    normalized intrinsics [B, 4] float64.
    """

    images: Tensor
    moments: Tensor
    camera_to_world: Tensor
    labels: Tensor
    intrinsics: Tensor

    @property
    def latents(self) -> Tensor:
        """The means of the latents, [B, C, h, w]."""
        return latent_mean(self.moments)


class Views(Protocol):
    """Views to evaluate: all of them by reference, and the data of any few of them."""

    def references(self) -> list[ViewRef]: ...

    def load(self, views: tuple[ViewRef, ...]) -> ViewBatch: ...

    def background(self) -> Tensor | None:
        """The colour [3] behind the object; None if there is no such colour."""
        ...

    @property
    def keeps_transparency(self) -> bool:
        """Whether `transparent` has an answer."""
        ...

    def transparent(self, views: tuple[ViewRef, ...]) -> Tensor:
        """Views of one bin without their background, [B, 4, H, W]: light and transmittance."""
        ...


class SplitViews:
    """Views of a split, within `radii` if given, at most `views_per_radius` in every unit bin: the first by key."""

    def __init__(self, data: Path, split: str, radii: tuple[int, int] | None, views_per_radius: int | None) -> None:
        if split == "train":
            raise ConfigError("--split train: the training split keeps no pictures; evaluate another split")
        self._data, self._reader = data, ShardReader(data, split)
        self.keeps_transparency = self._reader.manifest.keeps_views
        self._camera_to_world = self._reader.camera_to_world()
        self._split, self._radii, self._limit = split, radii, views_per_radius

    def references(self) -> list[ViewRef]:
        keys = self._reader.keys()
        radii = camera_radius(self._camera_to_world).tolist()
        bins, _ = radius_bins(radii, self._radii)
        taken: dict[int, int] = {}
        views = []
        for position in sorted(range(len(keys)), key=keys.__getitem__):
            bin_ = bins[position]
            if bin_ is None or (self._limit is not None and taken.get(bin_, 0) >= self._limit):
                continue
            taken[bin_] = taken.get(bin_, 0) + 1
            views.append(ViewRef(keys[position], position, radii[position], bin_))
        if not views:
            raise DataError(
                f"split '{self._split}' has no view with a radius in {list(self._radii or ())}; "
                f"its radii are {min(radii):.3g} to {max(radii):.3g}"
            )
        return views

    def load(self, views: tuple[ViewRef, ...]) -> ViewBatch:
        indices = [view.position for view in views]
        return ViewBatch(
            self._reader.images(indices),
            self._reader.moments(indices).float(),
            self._camera_to_world[indices],
            self._reader.labels()[indices],
            self._reader.intrinsics(indices),
        )

    @cached_property
    def _view_reader(self) -> ShardReader:
        """Reads the views, too, which nothing but `transparent` needs."""
        return ShardReader(self._data, self._split, views=True)

    def transparent(self, views: tuple[ViewRef, ...]) -> Tensor:
        samples = self._view_reader.samples(np.array([view.position for view in views]))
        if samples.faults:
            raise DataError(samples.faults[min(samples.faults)])
        assert samples.view is not None
        return samples.view.float() / 255.0

    def background(self) -> Tensor | None:
        count = len(self._reader)
        chosen = range(0, count, -(-count // BACKGROUND_VIEWS))
        return background_colour(self._reader.images(list(chosen)))


class RenderedViews:
    """Views of a scene, the built-in or a fitted one, `views_per_radius` in every unit bin of `radii`.

    Camera i of bin a is a pure function of (seed, a, i), of another stream than the training cameras. Where cameras may
    stand and look, their roll and field of view, supersampling and label are those of the recipe's training source.
    """

    keeps_transparency = True

    def __init__(
        self,
        source: SceneSource,
        image_size: int,
        codec: Codec,
        radii: tuple[int, int],
        views_per_radius: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.source, self._codec, self._seed, self._device = source, codec, seed, device
        self._radii, self._count, self._size = radii, views_per_radius, image_size
        self._scene = open_scene(source.scene)

    def references(self) -> list[ViewRef]:
        views = []
        for bin_ in range(*self._radii):
            positions = bin_ * VIEWS_PER_BIN_AT_MOST + torch.arange(self._count)
            radii = camera_radius(self._cameras(bin_, positions)[0]).tolist()
            views += [ViewRef(f"r{bin_:02d}_{i:06d}", int(positions[i]), radii[i], bin_) for i in range(self._count)]
        return views

    def _cameras(self, bin_: int, positions: Tensor) -> tuple[Tensor, list[Intrinsics]]:
        poses, fov_deg = evaluation_cameras(self.source, self._seed, positions, (bin_, bin_ + 1))
        return poses, [Intrinsics.from_fov(each, self._size, self._size) for each in fov_deg.tolist()]

    @property
    def varied(self) -> bool:
        """Whether cameras differ in more than where they stand, which earlier versions left out."""
        return bool(self.source.roll_deg or self.source.target_jitter or self.source.fov_range_deg)

    def cameras(self, views: tuple[ViewRef, ...]) -> tuple[Tensor, list[Intrinsics]]:
        """The cameras of views of one bin: camera_to_world [B, 4, 4] float64 and intrinsics."""
        return self._cameras(views[0].bin, torch.tensor([view.position for view in views]))

    def load(self, views: tuple[ViewRef, ...]) -> ViewBatch:
        source, (poses, intrinsics) = self.source, self.cameras(views)
        how = source.supersample, source.background
        cameras = zip(poses, intrinsics, strict=True)
        images = torch.stack([render(self._scene, *camera, *how) for camera in cameras])
        moments = self._codec.encode_moments(images.to(self._device))
        normalized = torch.tensor([each.normalized() for each in intrinsics], dtype=torch.float64)
        return ViewBatch(images, moments, poses, torch.full((len(views),), source.label), normalized)

    def transparent(self, views: tuple[ViewRef, ...]) -> Tensor:
        cameras = zip(*self.cameras(views), strict=True)
        return torch.stack([look(self._scene, *camera, self.source.supersample).planes() for camera in cameras])

    def background(self) -> Tensor | None:
        return backdrop(self._scene, self.source.background)


class PhotoViews:
    """Posed photos of the object: .npz files, a transforms.json or a COLMAP model, in the frame of the user's poses.

    Each is resampled to the training pictures' camera. Transparent ones lie on the training background; what a photo
    does not show has the median colour of its border.
    """

    keeps_transparency = False

    def __init__(
        self,
        path: Path,
        preprocess: Preprocess,
        similarity: Similarity,
        label: int,
        codec: Codec,
        device: torch.device,
    ) -> None:
        red, green, blue = preprocess.background(label).tolist()
        self.photos = read_photos(path, (red, green, blue))
        self._poses = similarity.cameras(self.photos.camera_to_world)
        self._path, self._preprocess, self._label, self._codec = path, preprocess, label, codec
        self._device = device

    def references(self) -> list[ViewRef]:
        radii = camera_radius(self._poses).tolist()
        bins, _ = radius_bins(radii, None)
        named = enumerate(zip(radii, bins, strict=True))
        return [ViewRef(f"photo_{i:06d}", i, radius, bin_) for i, (radius, bin_) in named if bin_ is not None]

    def load(self, views: tuple[ViewRef, ...]) -> ViewBatch:
        indices = [view.position for view in views]
        images = torch.stack([self._framed(index) for index in indices])
        moments = self._codec.encode_moments(images.to(self._device))
        camera = self._preprocess.camera
        assert camera is not None
        intrinsics = torch.tensor([camera.normalized()] * len(views), dtype=torch.float64)
        labels = torch.full((len(views),), self._label)
        return ViewBatch(images, moments, self._poses[indices], labels, intrinsics)

    def _framed(self, index: int) -> Tensor:
        picture = self.photos.pictures([index])
        border = border_pixels(picture).quantile(0.5, dim=0)
        name = f"{self._path}: photo {index}"
        return framed(picture[0], self._preprocess, name, self.photos.intrinsics[index], background=border)

    def background(self) -> Tensor | None:
        return background_colour(torch.stack([self._framed(index) for index in range(min(16, len(self.photos)))]))

    def transparent(self, views: tuple[ViewRef, ...]) -> Tensor:
        raise DataError(f"{self._path}: photos do not tell what is transparent")


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [0, 1] to [B, H, W, 3] uint8."""
    return (images * 255.0).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
