"""Sources of views: scenes, .npz files, or a transforms.json. Poses are known before pictures are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sitdist.config.recipe import NpzSource, RadiusAugmentation, SceneSource, TransformsSource
from sitdist.errors import DataError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, camera_radius
from sitdist.geometry.resample import resampled
from sitdist.io.arrays import PosedArray, npz_files, read_posed_array
from sitdist.io.atomic import file_sha256
from sitdist.io.files import require_memory, sha256_of
from sitdist.io.images import to_pixels
from sitdist.io.transforms import read_posed_files, transforms_file
from sitdist.scene.views import (
    backdrop,
    border_pixels,
    capture_similarity,
    look,
    open_scene,
    random_cameras,
    random_fov_deg,
    scene_files,
)

BORDER_TOLERANCE = 0.04  # how far a pixel of a plain background may be from its colour
PAST_ORIGIN = 1e-2  # with radius augmentation, how far a camera may look past the origin, relative to its distance


class ViewSource(ABC):
    """Views by index. Poses and intrinsics are cheap; pictures are made on demand. Threads may share a source."""

    camera_to_world: Tensor  # [N, 4, 4] float64
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.camera_to_world)

    @abstractmethod
    def intrinsics(self, index: int) -> Intrinsics:
        """The intrinsics of view `index`, in pixels."""

    @abstractmethod
    def views(self, indices: Sequence[int]) -> Tensor:
        """These views without their background, [B, 4, H, W] float32: light (colour times opacity) and transmittance.

        The transmittance is 0 where a picture has no alpha. DataError if one is not a picture.
        """

    @abstractmethod
    def background(self, index: int) -> Tensor | None:
        """The colour [3] behind view `index`; None where it is unknown or not plain."""

    def pictures(self, indices: Sequence[int], views: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of `views` before their backgrounds."""
        return torch.stack([self._on_background(index, view) for index, view in zip(indices, views, strict=True)])

    def _on_background(self, index: int, view: Tensor) -> Tensor:
        if not view[3].any():
            return view[:3].clamp(0.0, 1.0)
        background = self.background(index)
        assert background is not None
        return (view[:3] + view[3] * background[:, None, None]).clamp(0.0, 1.0)

    def images(self, indices: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of these views; DataError if one is not a picture."""
        return self.pictures(indices, self.views(indices))

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of everything that the views depend on."""

    @property
    def original(self) -> Tensor:
        """The view [N] that each one is a zoomed copy of; for all other views the view itself."""
        return torch.arange(len(self))

    def similarities(self) -> dict[int, dict[str, Any]]:
        """By label, the similarity from the frame of an object's capture to that of the poses, where it is known."""
        return {}


SourceConfig = SceneSource | NpzSource | TransformsSource


def open_source(config: SourceConfig | list[SourceConfig], image_size: int) -> ViewSource:
    """The views that `config` describes, as square pictures of `image_size` pixels; DataError, PoseError."""
    if isinstance(config, list):
        return _MixedViews([open_source(each, image_size) for each in config])
    source: ViewSource
    if isinstance(config, SceneSource):
        source = _SceneViews(config, image_size)
    elif isinstance(config, NpzSource):
        source = _NpzViews(config, image_size)
    else:
        source = _TransformsViews(config, image_size)
    if config.radius_augmentation is None:
        return source
    given = config.radius_augmentation.background
    background = source.background(0) if given is None else torch.tensor(given)
    if background is None:
        raise DataError(
            "radius_augmentation has no background, and that of the pictures is not plain; set "
            "radius_augmentation.background, such as [1, 1, 1]"
        )
    return _RadiusAugmentedViews(source, config.radius_augmentation, background)


class _MixedViews(ViewSource):
    """Views of several sources, interleaved evenly: any range of them holds every source in proportion.

    View j of a source of n views has the place (j + 1/2) / n; views are sorted by place, then by source.
    """

    def __init__(self, sources: Sequence[ViewSource]) -> None:
        self._sources = sources
        places = torch.cat([(torch.arange(len(source)).double() + 0.5) / len(source) for source in sources])
        self._order = order = places.argsort(stable=True)
        self._source = torch.repeat_interleave(torch.tensor([len(source) for source in sources]))[order]
        self._view = torch.cat([torch.arange(len(source)) for source in sources])[order]
        self.camera_to_world = torch.cat([source.camera_to_world for source in sources])[order]
        self.labels = torch.cat([source.labels for source in sources])[order]

    def intrinsics(self, index: int) -> Intrinsics:
        source, view = self._place(index)
        return source.intrinsics(view)

    def _place(self, index: int) -> tuple[ViewSource, int]:
        """The source of a view, and its number there."""
        return self._sources[int(self._source[index])], int(self._view[index])

    def views(self, indices: Sequence[int]) -> Tensor:
        return torch.cat([source.views([view]) for source, view in map(self._place, indices)])

    def background(self, index: int) -> Tensor | None:
        source, view = self._place(index)
        return source.background(view)

    def _on_background(self, index: int, view: Tensor) -> Tensor:
        source, number = self._place(index)
        return source._on_background(number, view)

    @property
    def original(self) -> Tensor:
        starts = np.cumsum([0, *map(len, self._sources)])
        joined = torch.cat([source.original + int(start) for source, start in zip(self._sources, starts, strict=False)])
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(self))  # of each view of the concatenated sources
        return place[joined[self._order]]

    def fingerprint(self) -> str:
        return sha256_of(*(source.fingerprint().encode() for source in self._sources))

    def similarities(self) -> dict[int, dict[str, Any]]:
        return {label: value for source in self._sources for label, value in source.similarities().items()}


class _RadiusAugmentedViews(ViewSource):
    """Every view of a source, followed by its copies at other distances, drawn by (seed, view).

    The picture of a copy is zoomed by r / r' about its principal point, and its camera is moved to radius r' along its
    line of sight, which has to meet the origin (DataError).
    """

    def __init__(self, source: ViewSource, config: RadiusAugmentation, background: Tensor) -> None:
        self._source, self._config, self._background = source, config, background
        count, group = len(source), 1 + config.copies
        radius = _radius_of_sight(source.camera_to_world)
        low, high = config.range
        uniforms = draws.uniform(config.seed, "radius augmentation", torch.arange(count), config.copies)
        ratio = (low + (high - low) * uniforms) / radius[:, None]  # r' / r
        self._ratio = torch.cat([torch.ones(count, 1, dtype=torch.float64), ratio], dim=1).flatten()  # [N]
        self.camera_to_world = source.camera_to_world.repeat_interleave(group, dim=0)
        self.camera_to_world[:, :3, 3] *= self._ratio[:, None]
        self.labels = source.labels.repeat_interleave(group)

    @property
    def original(self) -> Tensor:
        group = 1 + self._config.copies
        return torch.arange(len(self)) // group * group

    def intrinsics(self, index: int) -> Intrinsics:
        return self._source.intrinsics(index // (1 + self._config.copies))

    def views(self, indices: Sequence[int]) -> Tensor:
        views = self._source.views([index // (1 + self._config.copies) for index in indices])
        return torch.stack([self._zoomed(index, view) for index, view in zip(indices, views, strict=True)])

    def _zoomed(self, index: int, view: Tensor) -> Tensor:
        if self._is_original(index):
            return view
        camera, empty = self.intrinsics(index), view.new_tensor([0.0, 0.0, 0.0, 1.0])
        if not view[3].any():  # a picture without alpha: what lies around it is the background
            empty[:3] = self._background
            empty[3] = 0.0
        return resampled(view, 1.0 / float(self._ratio[index]), (camera.cx, camera.cy), empty)

    def background(self, index: int) -> Tensor | None:
        return self._background

    def _is_original(self, index: int) -> bool:
        return index % (1 + self._config.copies) == 0

    def _on_background(self, index: int, view: Tensor) -> Tensor:
        if self._is_original(index):
            return self._source._on_background(index // (1 + self._config.copies), view)
        return _in_steps(super()._on_background(index, view))

    def fingerprint(self) -> str:
        settings = f"{self._config.model_dump_json()} {self._background.tolist()}"
        return sha256_of(self._source.fingerprint().encode(), settings.encode())

    def similarities(self) -> dict[int, dict[str, Any]]:
        return self._source.similarities()


def _radius_of_sight(camera_to_world: Tensor) -> Tensor:
    """Distances [N] of cameras to the origin; DataError unless all look at it, to PAST_ORIGIN of their distance."""
    position, backward = camera_to_world[:, :3, 3], camera_to_world[:, :3, 2]
    radius, along = camera_radius(camera_to_world), (position * backward).sum(-1)
    past = torch.linalg.vector_norm(position - along[:, None] * backward, dim=-1) / radius
    wrong = ((past > PAST_ORIGIN) | (along <= 0)).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"radius_augmentation: view {wrong[0]} looks past the origin by {past[wrong[0]]:.1%} of its distance, so "
            "that a zoom about its centre is no camera moved towards the origin; centre the poses, or remove "
            "radius_augmentation"
        )
    return radius


class _SceneViews(ViewSource):
    """Pictures of a scene from random cameras; view i is a pure function of (seed, i)."""

    def __init__(self, config: SceneSource, image_size: int) -> None:
        self.config, self._size = config, image_size
        copies = 0 if config.radius_augmentation is None else config.radius_augmentation.copies
        need = (500 + 150 * copies) * config.views
        require_memory(need, f"the cameras of {config.views:,} views", "give fewer views or copies")
        self._scene = open_scene(config.scene)
        self._background = backdrop(self._scene, config.background)
        positions = torch.arange(config.views)
        self.camera_to_world = random_cameras(config, positions)
        self._fov_deg = random_fov_deg(config, positions)
        self.labels = torch.full((config.views,), config.label)

    def intrinsics(self, index: int) -> Intrinsics:
        return Intrinsics.from_fov(float(self._fov_deg[index]), self._size, self._size)

    def views(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._look(index) for index in indices])

    def _look(self, index: int) -> Tensor:
        camera_to_world, intrinsics = self.camera_to_world[index], self.intrinsics(index)
        return look(self._scene, camera_to_world, intrinsics, self.config.supersample).planes()

    def background(self, index: int) -> Tensor | None:
        return self._background

    def _on_background(self, index: int, view: Tensor) -> Tensor:
        return _in_steps(super()._on_background(index, view))

    def fingerprint(self) -> str:
        files = [] if self.config.scene is None else scene_files(self.config.scene)
        hashes = [file_sha256(file).encode() for file in files]
        return sha256_of(self.config.model_dump_json().encode(), str(self._size).encode(), *hashes)

    def similarities(self) -> dict[int, dict[str, Any]]:
        similarity = capture_similarity(self._scene)
        return {} if similarity is None else {self.config.label: similarity}


class _NpzViews(ViewSource):
    """images [N, H, W, 3] (uint8, or float in [0, 1]), poses [N, 4, 4], focal in pixels, from several files."""

    def __init__(self, config: NpzSource, image_size: int) -> None:
        self._label = config.label
        self._files = npz_files(map(Path, config.paths), "set the recipe's paths to your posed pictures")
        self._arrays = [read_posed_array(file) for file in self._files]
        for file, array in zip(self._files, self._arrays, strict=True):
            if array.images.shape[1:3] != (image_size, image_size):
                raise DataError(
                    f"{file}: images of {array.images.shape[2]}x{array.images.shape[1]} pixels but the recipe's "
                    f"image_size is {image_size}; set image_size to the images' size, or resize them (and scale focal)"
                )
        self._starts = np.cumsum([0, *(len(array.images) for array in self._arrays)])
        self.camera_to_world = torch.cat([array.camera_to_world for array in self._arrays])
        self.labels = torch.full((len(self.camera_to_world),), config.label)

    def _place(self, index: int) -> tuple[PosedArray, int]:
        """The file of a view, and its row in it."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._arrays[file], index - int(self._starts[file])

    def intrinsics(self, index: int) -> Intrinsics:
        return self._place(index)[0].intrinsics

    def views(self, indices: Sequence[int]) -> Tensor:
        places = [self._place(index) for index in indices]
        return torch.stack([_opaque(_picture(array.images[row])) for array, row in places])

    @cached_property
    def _background(self) -> Tensor | None:
        return plain_background(self.views(_some(len(self)))[:, :3])

    def background(self, index: int) -> Tensor | None:
        return self._background

    def fingerprint(self) -> str:
        return sha256_of(str(self._label).encode(), *(file_sha256(file).encode() for file in self._files))


class _TransformsViews(ViewSource):
    """Frames of a Blender or nerfstudio transforms.json: OpenGL camera-to-world matrices and picture files."""

    def __init__(self, config: TransformsSource, image_size: int) -> None:
        self._config = config
        self._file = transforms_file(Path(config.path))
        self._views = read_posed_files(self._file)
        for view in self._views:
            if view.distortion is not None:
                raise DataError(
                    f"{view.picture}: its lens has distortion; make pictures of a pinhole camera by "
                    f"`sitdist photos {self._file} --out FOLDER`"
                )
            camera = view.intrinsics
            if (camera.width, camera.height) != (image_size, image_size):
                raise DataError(
                    f"{view.picture}: {camera.width}x{camera.height} pixels but the recipe's image_size is "
                    f"{image_size}; all pictures of a dataset have one size"
                )
        self.camera_to_world = torch.stack([view.camera_to_world for view in self._views])
        self.labels = torch.full((len(self._views),), config.label)

    def intrinsics(self, index: int) -> Intrinsics:
        return self._views[index].intrinsics

    def views(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._read(self._views[index].picture) for index in indices])

    @staticmethod
    def _read(path: Path) -> Tensor:
        colour, alpha = to_pixels(path, str(path))
        return _opaque(colour) if alpha is None else torch.cat([colour * alpha, 1.0 - alpha[None]])

    @cached_property
    def _learned(self) -> Tensor | None:
        views = self.views(_some(len(self)))
        opaque = views[~views[:, 3].flatten(1).any(1)]
        if len(opaque) > len(views) // 2:
            return plain_background(opaque[:, :3])
        return torch.tensor(self._config.background)

    def background(self, index: int) -> Tensor | None:
        return self._learned

    def _on_background(self, index: int, view: Tensor) -> Tensor:
        given = torch.tensor(self._config.background)[:, None, None]  # of pictures with alpha
        return (view[:3] + given * view[3]).clamp(0.0, 1.0)

    def fingerprint(self) -> str:
        background = str((self._config.background, self._config.label)).encode()
        files = (self._file, *(view.picture for view in self._views))
        return sha256_of(background, *(file_sha256(path).encode() for path in files))


def _picture(image: np.ndarray) -> Tensor:
    """[H, W, 3] uint8, or float in [0, 1] but for rounding, as float32 [3, H, W] in [0, 1]."""
    scale = np.float32(255.0) if image.dtype == np.uint8 else np.float32(1.0)
    return torch.from_numpy(image.astype(np.float32) / scale).permute(2, 0, 1).clamp(0.0, 1.0)


def _opaque(picture: Tensor) -> Tensor:
    """A picture [3, H, W] without alpha as a view [4, H, W]."""
    return torch.cat([picture, torch.zeros_like(picture[:1])])


def _in_steps(picture: Tensor) -> Tensor:
    """A picture in steps of 1/255."""
    return (picture * 255.0).round() / 255.0


def _some(count: int, most: int = 64) -> list[int]:
    """At most `most` of `count` views, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most)).long().tolist()


def plain_background(pictures: Tensor) -> Tensor | None:
    """The colour [3] that nine tenths of the border pixels of pictures [N, 3, H, W] have; None if there is none."""
    border = border_pixels(pictures)
    colour = border.quantile(0.5, dim=0)
    same = (border - colour).abs().amax(dim=1) < BORDER_TOLERANCE
    return colour if same.float().mean() > 0.9 else None


def cut_out(picture: Tensor, background: Tensor) -> Tensor:
    """The view [4, H, W] that gives `picture` [3, H, W] on a plain `background` [3], with the least opaque edges.

    An opacity is at least what the pixel's colour needs. Pixels that differ from the background, and those that such
    pixels enclose, are opaque but at their edge.
    """
    difference = picture - background[:, None, None]
    room = torch.where(difference > 0, 1.0 - background[:, None, None], background[:, None, None])
    opacity = (difference.abs() / room.clamp_min(1e-3)).amax(dim=0).clamp(0.0, 1.0)  # [H, W]
    solid = ndimage.binary_fill_holes(difference.abs().amax(dim=0).numpy() > 2.0 * BORDER_TOLERANCE)
    inside = torch.from_numpy(ndimage.binary_erosion(solid, np.ones((3, 3)))).float()
    through = 1.0 - opacity.maximum(inside)
    return torch.cat([picture - through * background[:, None, None], through[None]])
