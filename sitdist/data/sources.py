"""Where views come from: scenes, .npz files, or a transforms.json. Poses are known before pictures."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitdist.config import NpzSource, RadiusAugmentation, SceneSource, TransformsSource
from sitdist.data.scene import (
    capture_similarity,
    open_scene,
    random_cameras,
    random_fov_deg,
    render,
    scene_background,
    scene_files,
)
from sitdist.data.zoom import zoomed
from sitdist.errors import DataError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, camera_radius
from sitdist.geometry.pose import check_rigid
from sitdist.io.atomic import file_sha256
from sitdist.io.memory import require_memory

PAST_ORIGIN = 1e-2  # of its distance: how far beside the origin a camera may look whose radius is augmented


@dataclass(frozen=True)
class View:
    """One posed picture: image [3, H, W] in [0, 1], camera_to_world [4, 4] float64, intrinsics, the object's label."""

    image: Tensor
    camera_to_world: Tensor
    intrinsics: Intrinsics
    label: int


class ViewSource(ABC):
    """Views by index; poses and intrinsics of all are cheap, pictures are made when they are asked for.

    Several threads may ask at once.
    """

    camera_to_world: Tensor  # [N, 4, 4] float64
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.camera_to_world)

    @abstractmethod
    def intrinsics(self, index: int) -> Intrinsics:
        """Of view `index`, in pixels."""

    @abstractmethod
    def images(self, indices: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of these views; DataError if one is not a picture."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of everything the views depend on."""

    @property
    def original(self) -> Tensor:
        """The view [N] that each is a zoomed copy of; itself where it is none."""
        return torch.arange(len(self))

    def similarities(self) -> dict[int, dict[str, Any]]:
        """By label, what took the frame of an object's capture to that of the poses, where that is known."""
        return {}

    def views(self, indices: Sequence[int]) -> list[View]:
        """These views, pictures and all."""
        images = self.images(indices)
        return [
            View(image, self.camera_to_world[index], self.intrinsics(index), int(self.labels[index]))
            for image, index in zip(images, indices, strict=True)
        ]


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
    return _RadiusAugmentedViews(source, config.radius_augmentation, _background(config))


def _background(config: SourceConfig) -> Tensor:
    """The colour [3] behind the object of a source that is radius augmented."""
    assert config.radius_augmentation is not None
    colour = config.radius_augmentation.background
    if colour is None and not isinstance(config, NpzSource):
        colour = config.background
    return scene_background(config.scene) if colour is None else torch.tensor(colour)  # type: ignore[union-attr]


class _MixedViews(ViewSource):
    """Views of several sources, mixed evenly: any stretch of them holds every source in proportion.

    View j of a source of n views has the place (j + 1/2) / n; all views are in order of their places, then sources.
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
        return self._sources[int(self._source[index])].intrinsics(int(self._view[index]))

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.cat([self._sources[int(self._source[i])].images([int(self._view[i])]) for i in indices])

    @property
    def original(self) -> Tensor:
        starts = np.cumsum([0, *map(len, self._sources)])
        joined = torch.cat([source.original + int(start) for source, start in zip(self._sources, starts, strict=False)])
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(self))  # of a view of the sources one behind the other
        return place[joined[self._order]]

    def fingerprint(self) -> str:
        return _sha256(*(source.fingerprint().encode() for source in self._sources))

    def similarities(self) -> dict[int, dict[str, Any]]:
        return {label: value for source in self._sources for label, value in source.similarities().items()}


class _RadiusAugmentedViews(ViewSource):
    """Every view of a source, and behind it its copies as from other distances, drawn by (seed, view).

    A copy's picture is zoomed by r / r' about its principal point, and its camera moved to radius r' along its line
    of sight, which has to meet the origin (DataError).
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

    def images(self, indices: Sequence[int]) -> Tensor:
        group = 1 + self._config.copies
        pictures = self._source.images([index // group for index in indices])
        return torch.stack([self._picture(index, picture) for index, picture in zip(indices, pictures, strict=True)])

    def _picture(self, index: int, picture: Tensor) -> Tensor:
        if index % (1 + self._config.copies) == 0:
            return picture
        camera = self.intrinsics(index)
        return zoomed(picture, 1.0 / float(self._ratio[index]), (camera.cx, camera.cy), self._background)

    def fingerprint(self) -> str:
        settings = f"{self._config.model_dump_json()} {self._background.tolist()}"
        return _sha256(self._source.fingerprint().encode(), settings.encode())

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
        positions = torch.arange(config.views)
        self.camera_to_world = random_cameras(config, positions)
        self._fov_deg = random_fov_deg(config, positions)
        self.labels = torch.full((config.views,), config.label)

    def intrinsics(self, index: int) -> Intrinsics:
        return Intrinsics.from_fov(float(self._fov_deg[index]), self._size, self._size)

    def images(self, indices: Sequence[int]) -> Tensor:
        pictures = [
            render(
                self._scene,
                self.camera_to_world[index],
                self.intrinsics(index),
                self.config.supersample,
                self.config.background,
            )
            for index in indices
        ]
        return torch.stack(pictures)

    def fingerprint(self) -> str:
        files = [] if self.config.scene is None else scene_files(self.config.scene)
        hashes = [file_sha256(file).encode() for file in files]
        return _sha256(self.config.model_dump_json().encode(), str(self._size).encode(), *hashes)

    def similarities(self) -> dict[int, dict[str, Any]]:
        similarity = capture_similarity(self._scene)
        return {} if similarity is None else {self.config.label: similarity}


class _NpzViews(ViewSource):
    """images [N, H, W, 3] (uint8, or float in [0, 1]), poses [N, 4, 4], focal in pixels, from several files."""

    def __init__(self, config: NpzSource, image_size: int) -> None:
        self._label = config.label
        self._files = _npz_files(config.paths)
        images, poses, focals = [], [], []
        for file in self._files:
            image, pose, focal = _read_npz(file)
            if image.shape[1:3] != (image_size, image_size):
                raise DataError(
                    f"{file}: images of {image.shape[2]}x{image.shape[1]} pixels but the recipe's image_size is "
                    f"{image_size}; set image_size to the images' size, or resize them (and scale focal)"
                )
            if image.dtype != np.uint8:
                for row in range(len(image)):  # now, before anything is written
                    _check_pixels(image[row], f"{file}: image {row}")
            images.append(image)
            poses.append(pose)
            focals += [focal] * len(image)
        self._images = images
        self._focals = focals
        self._starts = np.cumsum([0, *map(len, images)])
        self.camera_to_world = torch.cat(poses)
        self.labels = torch.full((len(self.camera_to_world),), config.label)

    def intrinsics(self, index: int) -> Intrinsics:
        size = self._images[0].shape[1]
        return Intrinsics(self._focals[index], self._focals[index], 0.5 * size, 0.5 * size, size, size)

    def images(self, indices: Sequence[int]) -> Tensor:
        pictures = []
        for index in indices:
            file = int(np.searchsorted(self._starts, index, side="right")) - 1
            row = index - int(self._starts[file])
            pictures.append(_picture(self._images[file][row]))
        return torch.stack(pictures)

    def fingerprint(self) -> str:
        return _sha256(str(self._label).encode(), *(file_sha256(file).encode() for file in self._files))


PINHOLE_MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "RADIAL", "SIMPLE_RADIAL", "PERSPECTIVE")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


class _TransformsViews(ViewSource):
    """Frames of a Blender or nerfstudio transforms.json: OpenGL camera-to-world matrices and picture files."""

    def __init__(self, config: TransformsSource, image_size: int) -> None:
        self._label, self._background = config.label, config.background
        self._file, self._size = Path(config.path), image_size
        if self._file.is_dir():
            self._file = self._file / "transforms.json"
        if not self._file.is_file():
            raise DataError(f"{self._file}: no such file; give the path of a transforms.json or its folder")
        try:
            values = json.loads(self._file.read_text())
            frames = [{**values, **frame} for frame in values["frames"]]  # a frame's own values come first
            matrices = [np.array(frame["transform_matrix"], dtype=np.float64) for frame in frames]
            names = [str(frame["file_path"]) for frame in frames]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._file}: no list of frames with file_path and transform_matrix ({error!r})"
            ) from None
        if not frames:
            raise DataError(f"{self._file}: holds no frames")
        poses = [torch.from_numpy(matrix) for matrix in matrices]
        for pose, name in zip(poses, names, strict=True):
            check_rigid(pose, f"{self._file}: frame {name}")
        self.camera_to_world = torch.stack(poses)
        self.labels = torch.full((len(poses),), config.label)
        self._intrinsics = [self._pinhole(frame, f"{self._file}: frame {frame['file_path']}") for frame in frames]
        self._pictures = [self._find(name) for name in names]
        for path in self._pictures:
            self._check_size(path)

    def intrinsics(self, index: int) -> Intrinsics:
        return self._intrinsics[index]

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._read(self._pictures[index]) for index in indices])

    def fingerprint(self) -> str:
        background = str((self._background, self._label)).encode()
        return _sha256(background, *(file_sha256(path).encode() for path in (self._file, *self._pictures)))

    def _pinhole(self, values: dict[str, Any], name: str) -> Intrinsics:
        """A frame's camera; DataError unless it is a pinhole camera for pictures of the recipe's size."""
        model = values.get("camera_model", "PINHOLE")
        if model not in PINHOLE_MODELS:
            raise DataError(f"{name}: camera_model {model} is no pinhole camera; undistort the pictures first")
        for key in DISTORTION:
            if _number(values, key, 0.0, name) != 0.0:
                raise DataError(
                    f"{name}: distortion {key} is {values[key]}, but a pinhole camera has none; undistort first"
                )
        size = self._size
        for key in ("w", "h"):
            if _number(values, key, size, name) != size:
                raise DataError(
                    f"{name}: {key} is {values[key]} but the recipe's image_size is {size}, and fl_x, cx and the like "
                    "are in pixels; resize the pictures and scale them alike, or set image_size"
                )
        if "fl_x" in values:
            fx = _number(values, "fl_x", 0.0, name)
            fy = _number(values, "fl_y", fx, name)
            cx, cy = (_number(values, key, 0.5 * size, name) for key in ("cx", "cy"))
            if fx <= 0 or fy <= 0:
                raise DataError(f"{name}: focal lengths {fx:g} and {fy:g}; expected positive numbers of pixels")
            return Intrinsics(fx, fy, cx, cy, size, size)
        angle = _number(values, "camera_angle_x", 0.0, name)
        if not 0.0 < angle < math.pi:
            raise DataError(
                f"{name}: no fl_x, and camera_angle_x is {values.get('camera_angle_x')}; "
                "give the focal length in pixels, or the angle of view in radians"
            )
        return Intrinsics.from_fov(math.degrees(angle), size, size)

    def _find(self, name: str) -> Path:
        path = self._file.parent / name
        for candidate in (path, path.with_name(path.name + ".png")):
            if candidate.is_file():
                return candidate
        raise DataError(f"{self._file}: picture {name} is missing (looked for {path}); restore it or remove its frame")

    def _check_size(self, path: Path) -> None:
        with _opened(path) as picture:
            width, height = picture.size
        if (width, height) != (self._size, self._size):
            raise DataError(
                f"{path}: {width}x{height} pixels but the recipe's image_size is {self._size}; "
                "all pictures of a dataset have one size"
            )

    def _read(self, path: Path) -> Tensor:
        with _opened(path) as picture:
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / np.float32(255.0)
        alpha = rgba[..., 3:]
        return _picture(rgba[..., :3] * alpha + np.asarray(self._background, dtype=np.float32) * (1.0 - alpha))


def _number(values: dict[str, Any], key: str, default: float, name: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name}: {key} is {value!r}; expected a number")
    return float(value)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture file, open; DataError where it cannot be read, now or while it is used."""
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable picture ({error}); replace it or remove its frame") from None


def _npz_files(paths: list[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.glob("*.npz"))
            if not found:
                raise DataError(f"{path}: folder without .npz files; put posed pictures there or name the files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; set the recipe's paths to your posed pictures")
    twice = next((file for place, file in enumerate(files) if file in files[:place]), None)
    if twice is not None:
        raise DataError(f"{twice}: given twice; its views would be in the dataset twice, so name it once")
    return files


def _read_npz(file: Path) -> tuple[np.ndarray, Tensor, float]:
    """images [N, H, W, 3], camera_to_world [N, 4, 4] float64 and focal in pixels, checked but for the pixels."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            missing = {"images", "poses", "focal"} - set(arrays.files)
            if missing:
                raise DataError(
                    f"{file}: no array '{sorted(missing)[0]}' (it has {', '.join(arrays.files)}); "
                    "expected images, poses and focal"
                )
            images, poses, focals = arrays["images"], arrays["poses"], arrays["focal"]
    except (OSError, ValueError, EOFError) as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{file}: images of several sizes (an object array); resize them to one size and save one array"
            ) from None
        raise DataError(f"{file}: not a readable .npz file ({error})") from None
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a readable .npz file ({error})") from None
    if images.ndim != 4 or images.shape[3] != 3 or len(images) == 0:
        raise DataError(f"{file}: images of shape {images.shape}; expected [N, H, W, 3] with N > 0")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{file}: images of type {images.dtype}; expected uint8, or float in [0, 1]")
    if poses.shape != (len(images), 4, 4):
        raise DataError(
            f"{file}: {len(images)} images but poses of shape {poses.shape}; expected [{len(images)}, 4, 4]"
        )
    if not all(
        np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer) for array in (poses, focals)
    ):
        raise DataError(f"{file}: poses of type {poses.dtype} and focal of type {focals.dtype}; expected real numbers")
    focal = np.unique(focals.astype(np.float64))
    if len(focal) != 1 or not np.isfinite(focal[0]) or focal[0] <= 0:
        raise DataError(f"{file}: focal {focals.ravel()[:3].tolist()}; expected one positive number of pixels")
    camera_to_world = torch.from_numpy(poses.astype(np.float64))
    for index, pose in enumerate(camera_to_world):
        check_rigid(pose, f"{file}: view {index}")
    return images, camera_to_world, float(focal[0])


def _check_pixels(image: np.ndarray, name: str) -> None:
    """DataError, naming the float picture, unless its pixels are in [0, 1]."""
    low, high = float(image.min()), float(image.max())  # NaN where a pixel is
    if not math.isfinite(low) or not math.isfinite(high):
        raise DataError(f"{name}: pixels hold NaN or infinity; repair or remove the picture")
    if low < -1e-3 or high > 1.0 + 1e-3:
        raise DataError(f"{name}: pixels from {low:.4g} to {high:.4g}; float pictures are in [0, 1] (divide by 255?)")


def _picture(image: np.ndarray) -> Tensor:
    """[H, W, 3] uint8, or float in [0, 1] but for rounding, as float32 [3, H, W] in [0, 1]."""
    scale = np.float32(255.0) if image.dtype == np.uint8 else np.float32(1.0)
    return torch.from_numpy(image.astype(np.float32) / scale).permute(2, 0, 1).clamp(0.0, 1.0)


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
