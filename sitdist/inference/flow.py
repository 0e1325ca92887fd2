"""A trained model in a few lines of Python: pictures of poses, and poses of pictures.

    import sitdist

    flow = sitdist.load("runs/chair")                      # a run, an exported folder, or a hub id
    pictures = flow.render(flow.turntable(24))             # [24, 3, H, W] in [0, 1]
    estimate = flow.estimate(["a.png", "b.png"])
    estimate.camera_to_world                               # [2, 4, 4]

Poses are camera-to-world matrices with OpenGL axes (x right, y up, the camera looks down its own -z), row-major, last
row 0, 0, 0, 1, in a world whose +z is up. Lengths are in the units of the frame: the dataset's, or the user's, which is
that of the photos where a scene was fitted to them. Results are on the CPU, wherever they were computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from sitdist.checks import LARGEST_SEED, array, choice, find_device, number, whole
from sitdist.errors import ConfigError, DataError, PoseError, as_told, shown
from sitdist.flow.estimate import EstimateOptions, PoseEstimate
from sitdist.flow.sample import SampleOptions
from sitdist.geometry.camera import Intrinsics, full_turn, orbit
from sitdist.geometry.pose import check_rigid
from sitdist.geometry.similarity import Similarity
from sitdist.inference.calibration import RunCalibration, load_calibration
from sitdist.inference.options import build_latent_estimate, build_sampling
from sitdist.inference.pose_reader import PoseReader, check_reading
from sitdist.inference.preprocess import Preprocess, camera_of, framed, nearest_square, resampled
from sitdist.inference.refine import SceneRefiner
from sitdist.inference.run import LoadedRun
from sitdist.io.files import require_memory
from sitdist.io.images import Picture
from sitdist.model.codec import latent_mean

LOOKS_AWAY = (
    "poses are camera-to-world with OpenGL axes (x right, y up, the camera looks down its own -z): invert "
    "world-to-camera matrices, and negate columns 2 and 3 of OpenCV poses"
)
Options = TypeVar("Options", SampleOptions, EstimateOptions)
Frame = Literal["dataset", "user"]
Camera = Any  # Intrinsics, a sequence of them, or numbers [4] or [N, 4]


class Flow:
    """A trained model, ready to use; `load` makes one.

    run: the model and all that it was trained with. preprocess: what all training pictures have in common. folder:
    where the calibration of its estimates is, if there is one.
    """

    def __init__(
        self, run: LoadedRun, preprocess: Preprocess, device: torch.device | str = "cpu", folder: Path | None = None
    ) -> None:
        self.run, self.preprocess, self.device, self.folder = run, preprocess, find_device(device), folder
        self._calibrations: dict[EstimateOptions, RunCalibration | None] = {}
        self._refiners: dict[str, SceneRefiner] = {}

    @property
    def image_size(self) -> int:
        """Width and height of the pictures that the model knows, in pixels."""
        return self.preprocess.size

    @property
    def camera(self) -> Intrinsics | None:
        """The intrinsics of the training pictures, in pixels; None where they are not known."""
        return self.preprocess.camera

    @property
    def objects(self) -> dict[int, str]:
        """Names of the objects by label."""
        return {entry.label: entry.name for entry in self.run.manifest.objects}

    @property
    def training_radius(self) -> tuple[float, float]:
        """The range of the training cameras' distances to the origin, in the dataset's units."""
        return self.run.manifest.splits["train"].radius

    @property
    def estimate_options(self) -> EstimateOptions:
        """How the run's config reads poses; `dataclasses.replace` changes a part of it."""
        return build_latent_estimate(self.run.config.evaluate)

    @property
    def zooms(self) -> tuple[float, ...]:
        """The zooms that `multi_zoom` of the run's config reads every picture at."""
        return tuple(self.run.config.evaluate.zooms)

    @property
    def sample_options(self) -> SampleOptions:
        """How the run's config renders; `dataclasses.replace` changes a part of it."""
        return build_sampling(self.run.config.evaluate)

    def to(self, device: torch.device | str) -> Flow:
        """Move the model, to `auto`, `cpu`, `cuda` and the like; returns itself."""
        self.device = find_device(device)
        self.run.model.to(self.device)
        self.run.codec.to(self.device)
        return self

    def turntable(self, views: int, radius: float | None = None, elevation_deg: float = 20.0) -> Tensor:
        """Poses [views, 4, 4] float64 of a closed circle of cameras that look at the origin, in the dataset's frame.

        radius: by default the middle of the training radii. elevation_deg: above the horizon.
        """
        views = whole("views", views, 1)
        require_memory(700 * views, f"a turntable of {views:,} views", "ask for fewer")
        return self.orbit(full_turn(views), elevation_deg, radius)

    def orbit(self, azimuth_deg: Any, elevation_deg: float, radius: float | None = None) -> Tensor:
        """Poses [..., 4, 4] float64 that look at the origin, in the dataset's frame.

        azimuth_deg: [...], from +x towards +y. elevation_deg: above the horizon. radius: as for `turntable`.
        """
        azimuth = array("azimuth_deg", azimuth_deg)
        if not (azimuth.abs() <= 1e6).all():  # a NaN is not, either
            raise ConfigError("azimuth_deg: expected angles in degrees between -1e6 and 1e6")
        elevation = number("elevation_deg", elevation_deg, -90.0, 90.0)
        return orbit(
            azimuth, elevation, 0.5 * sum(self.training_radius) if radius is None else number("radius", radius, 1e-6)
        )

    # ------------------------------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def render(
        self,
        camera_to_world: Tensor | np.ndarray | Sequence[Any],
        intrinsics: Camera = None,
        label: int = 0,
        *,
        frame: Frame = "dataset",
        seed: int = 0,
        options: SampleOptions | None = None,
        batch: int = 64,
    ) -> Tensor:
        """Pictures [N, 3, H, W] float32 in [0, 1] of the object from poses [N, 4, 4], or [4, 4] for one.

        intrinsics: `Intrinsics`, one for all or N of them, which also say H and W (one size for all); or fx, fy, cx, cy
        in pixels of a picture of the training size, [4] or [N, 4]. None: as the training pictures. Where the model was
        not trained on varying intrinsics, its picture is resampled, and what lies outside of it is background.
        label: of the object. frame: the poses' own. seed: of the noise, which is the same for all views, so that a
        picture depends on its pose and the seed alone. options: how to render, by default `sample_options`.
        PoseError for a pose that is not rigid, or whose camera looks away from an object that all training
        cameras look at; ConfigError for a model that renders no pictures.
        """
        why_not = self.run.config.flow.why_no_picture()
        if why_not:
            raise ConfigError(f"{self.run.manifest.name}: renders no pictures: {why_not}")
        label, seed, batch = self._check_label(label), whole("seed", seed, 0, LARGEST_SEED), whole("batch", batch, 1)
        options = _options(options, SampleOptions) or self.sample_options
        poses = self._to_dataset(self._check_poses(camera_to_world, frame), label, frame)
        size = (self.image_size, self.image_size)
        cameras = [
            camera_of(given, size, f"pose {index}") for index, given in enumerate(_per_view(intrinsics, len(poses)))
        ]
        self._check_memory(cameras, min(batch, len(poses)))
        pictures = [
            self._render(poses[start : start + batch], cameras[start : start + batch], label, seed, options)
            for start in range(0, len(poses), batch)
        ]
        return torch.cat(pictures)

    def _check_memory(self, cameras: Sequence[Intrinsics | None], batch: int) -> None:
        """OutOfMemoryError where the pictures of all cameras cannot have room; a cautious bound."""
        sizes = [(self.image_size, self.image_size) if each is None else (each.width, each.height) for each in cameras]
        pixels, latent = sum(width * height for width, height in sizes), self.run.manifest.latent
        tokens = latent.height * latent.width // self.run.config.model.sizes()["patch_size"] ** 2
        each = 12 * self.image_size**2 + 40 * tokens * self.run.config.model.sizes()["hidden_size"]
        what = f"{len(cameras):,} pictures of up to {max(sizes)[0]}x{max(sizes)[1]} pixels, {batch} at a time"
        require_memory(24 * pixels + batch * each, what, "render fewer at a time, or a smaller batch")

    def _render(
        self,
        poses: Tensor,
        cameras: Sequence[Intrinsics | None],
        label: int,
        seed: int,
        options: SampleOptions,
    ) -> Tensor:
        seen: list[Intrinsics | None] = [self.camera] * len(poses)  # by the model, before any resampling
        normalized = None
        if self.run.statistics.has_intrinsics:
            seen = [self.camera if each is None else nearest_square(each, self.image_size) for each in cameras]
            rows = [camera.normalized() for camera in seen if camera is not None]
            normalized = torch.tensor(rows, dtype=torch.float64, device=self.device)
        labels = torch.full((len(poses),), label, device=self.device)
        same_noise = torch.zeros(len(poses), dtype=torch.int64, device=self.device)
        poses = poses.to(self.device)
        pictures = self.run.render(poses, normalized, labels, options, seed, "render", same_noise).float().cpu()
        background, out = self._background(label), []
        for picture, source, target in zip(pictures, seen, cameras, strict=True):
            if target is None:
                out.append(picture)
            elif source is None:
                raise DataError("intrinsics: those of the training pictures are not known here; give none")
            else:
                out.append(resampled(picture, source, target, background, "intrinsics"))
        return torch.stack(out)

    def _background(self, label: int) -> Tensor | None:
        return self.preprocess.background(label) if label in self.preprocess.backgrounds else None

    # ---------------------------------------------------------------------------------------------------------- poses

    @torch.no_grad()
    def estimate(
        self,
        images: Picture | Sequence[Picture],
        intrinsics: Camera = None,
        mask: Any = None,
        label: int = 0,
        *,
        frame: Frame = "dataset",
        options: EstimateOptions | None = None,
        zooms: Sequence[float] | None = None,
        scene: str | Path | None = None,
        batch: int = 64,
    ) -> PoseEstimate:
        """The poses [N, 4, 4] of N pictures of the object, with what tells how far each is to be trusted.

        images: one or a sequence of files, PIL images, numpy arrays [H, W] or [H, W, C], tensors [H, W] or [C, H, W];
        or an array [N, H, W, C], or a tensor [N, C, H, W]. 8 or 16 bits or floats in [0, 1]; grey is made coloured,
        transparency put on the background of the training pictures. Files and PIL images are turned upright, as their
        EXIF orientation says.
        intrinsics: `Intrinsics`, one for all or N of them, or fx, fy, cx, cy in pixels of the upright picture, [4] or
        [N, 4]: the picture is resampled to the training camera. None: the largest centred square of the picture shows
        what a training picture shows. mask: like `images`, one channel: the object's share of every pixel; the rest
        becomes background. label: of the object. frame: the one of the poses that are returned, and of error bars;
        `packed_pose` and `spread` are the dataset's in any case. options: how to read poses, by default
        `estimate_options`. zooms: read every picture at each of these zooms about its centre, such as `flow.zooms`, and
        average. scene: the folder of a scene in the dataset's frame (or "built-in"), by which the poses are refined:
        error bars are then left out, and `converged` is False where the scene does not explain a picture.
        DataError for what is no picture or no scene, and for none at all; ConfigError for a model that reads no poses,
        or not so.
        """
        batch = whole("batch", batch, 1)
        pictures = _as_list(images)
        masks = [None] * len(pictures) if mask is None else _as_list(mask, channels=False)
        if len(masks) != len(pictures):
            raise DataError(f"{len(masks)} masks for {len(pictures)} pictures; give one for each")
        cameras = _per_view(intrinsics, len(pictures))
        reader = self._reader(label, options, zooms, scene)
        parts = []
        for start in range(0, len(pictures), batch):
            views = []
            for row in range(start, min(start + batch, len(pictures))):
                name = str(pictures[row]) if isinstance(pictures[row], str | Path) else f"picture {row}"
                views.append(framed(pictures[row], self.preprocess, name, cameras[row], masks[row], reader.background))
            known = [camera is not None for camera in cameras[start : start + batch]]
            parts.append(self._read(torch.stack(views), label, reader, torch.tensor(known)))
        return self._to_frame(PoseEstimate.concatenated(parts), label, frame)

    def check_estimates(
        self,
        label: int = 0,
        options: EstimateOptions | None = None,
        zooms: Sequence[float] | None = None,
        scene: str | Path | None = None,
    ) -> None:
        """ConfigError or DataError unless the model reads poses of this object in this way."""
        self._reader(label, options, zooms, scene)

    def _reader(
        self, label: int, options: EstimateOptions | None, zooms: Sequence[float] | None, scene: str | Path | None
    ) -> PoseReader:
        why_not = self.run.config.flow.why_no_pose()
        if why_not:
            raise ConfigError(f"{self.run.manifest.name}: reads no poses: {why_not}")
        options, config = _options(options, EstimateOptions) or self.estimate_options, self.run.config.evaluate
        background = self._background(self._check_label(label))
        if zooms is not None:
            values = array("zooms", zooms)
            if values.ndim != 1 or not 1 <= len(values) <= 100 or not ((values >= 0.01) & (values <= 100.0)).all():
                raise ConfigError(f"zooms {shown(zooms)}: give one or more, from 0.01 to 100 each")
            if background is None and float(values.min()) < 1.0:
                raise ConfigError(f"zooms {shown(zooms)}: below 1, the colour around the picture must be known")
            zooms = values.tolist()
        if scene is not None and not isinstance(scene, str | Path):
            raise ConfigError(f"scene {shown(scene)}: expected the folder of a scene, or built-in")
        check_reading(self.run, options, zooms)
        return PoseReader(
            self.run,
            options,
            None if zooms is None else tuple(zooms),
            background,
            None if scene is None else self._refiner(str(scene)),
            None if config.guidance is None else (config.guidance, config.guidance_channels),
        )

    def _refiner(self, scene: str) -> SceneRefiner:
        if scene not in self._refiners:
            try:
                self._refiners[scene] = SceneRefiner.open(scene, self.run.manifest, self.device)
            except OSError as error:
                raise as_told(error) or error from None
        if self.camera is None and not self.run.statistics.has_intrinsics:
            raise ConfigError(
                f"scene {scene}: the training pictures' intrinsics are not known here, as the dataset is not at hand; "
                "load an export that was made beside the dataset"
            )
        return self._refiners[scene]

    def _read(self, images: Tensor, label: int, reader: PoseReader, known: Tensor) -> PoseEstimate:
        """The poses of pictures [B, 3, S, S] that are like the training pictures, in the dataset's frame.

        known [B]: whether the user gave the intrinsics; others are read off a picture, if the dataset packs them.
        """
        images = images.to(self.device)
        moments, labels = self.run.codec.encode_moments(images), torch.full((len(images),), label, device=self.device)
        camera = [0.0, 0.0, 0.5, 0.5] if self.camera is None else self.camera.normalized()
        intrinsics = torch.tensor(camera).repeat(len(images), 1)
        estimate = reader.read(images, moments, labels, intrinsics)
        calibration = None if reader.zooms is not None else self.calibration(reader.options)
        if calibration is not None:
            estimate = calibration.fill(self.run, estimate, latent_mean(moments), labels)
        if self.run.statistics.has_intrinsics:
            intrinsics[~known, :2] = math.nan
        return reader.refined(estimate, images, intrinsics).cpu()

    def calibration(self, options: EstimateOptions | None = None) -> RunCalibration | None:
        """The error bars and the trust that `sitdist calibrate` fitted for poses read so; None where it did not."""
        options = _options(options, EstimateOptions) or self.estimate_options
        if self.folder is not None and options not in self._calibrations:
            self._calibrations[options] = load_calibration(self.folder, self.run, options)[0]
        return self._calibrations.get(options)

    # --------------------------------------------------------------------------------------------------------- frames

    def similarity(self, label: int = 0) -> Similarity:
        """What takes the user's frame to the dataset's; the identity where the poses were not moved."""
        label = self._check_label(label)
        values = next(entry.similarity for entry in self.run.manifest.objects if entry.label == label)
        return Similarity.identity() if values is None else Similarity.from_dict(values)

    def _to_dataset(self, camera_to_world: Tensor, label: int, frame: Frame) -> Tensor:
        """Poses of a frame in the dataset's; PoseError for cameras that look away where no training camera did."""
        user = _is_user(frame)
        poses = self.similarity(label).cameras(camera_to_world) if user else camera_to_world
        facts = self.run.manifest.splits["train"].cameras
        away = (poses[:, :3, 3] * poses[:, :3, 2]).sum(-1) < 0  # the object is behind the camera
        if away.any() and (facts is None or facts.looks_at_origin):
            raise PoseError(
                f"pose {int(away.nonzero()[0])}: its camera looks away from the origin, where the object is "
                f"({int(away.sum())} of {len(poses)} do); {LOOKS_AWAY}"
            )
        return poses

    def _to_frame(self, estimate: PoseEstimate, label: int, frame: Frame) -> PoseEstimate:
        if not _is_user(frame):
            return estimate
        back = self.similarity(label).inverse()
        std, bars = estimate.translation_std, estimate.translation_bars
        return replace(
            estimate,
            camera_to_world=back.cameras(estimate.camera_to_world),
            translation_std=None if std is None else back.scale * std,
            translation_bars=None if bars is None else back.scale * bars,
        )

    # --------------------------------------------------------------------------------------------------------- checks

    def _check_label(self, label: int) -> int:
        label = whole("label", label)
        if label not in self.objects:
            known = ", ".join(f"{number} ({name})" for number, name in self.objects.items())
            raise DataError(f"label {label}: the model knows no such object; it knows {known}")
        return label

    def _check_poses(self, camera_to_world: Any, frame: Frame) -> Tensor:
        _is_user(frame)
        poses = array("camera_to_world", camera_to_world, PoseError)
        if poses.ndim == 2:
            poses = poses[None]
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) == 0:
            raise PoseError(f"camera_to_world: shape {list(poses.shape)}; expected [N, 4, 4] or [4, 4], N above 0")
        for index, pose in enumerate(poses):
            check_rigid(pose, f"pose {index}")
        return poses


def _per_view(intrinsics: Camera, count: int) -> list[Intrinsics | list[float] | None]:
    """What a user gives for `count` views, for each of them; DataError where it is not that many, or no cameras."""
    given: list[Intrinsics | list[float] | None]
    if intrinsics is None or isinstance(intrinsics, Intrinsics):
        given = [intrinsics] * count
    elif isinstance(intrinsics, list | tuple) and all(isinstance(each, Intrinsics) for each in intrinsics):
        given = list(intrinsics)
    else:
        values = array("intrinsics", intrinsics, DataError).numpy()
        if values.shape == (4,):
            values = np.tile(values, (count, 1))
        if values.ndim != 2 or values.shape[1] != 4:
            raise DataError(f"intrinsics of shape {list(values.shape)}; expected fx, fy, cx, cy: [4] or [N, 4]")
        given = list(values.tolist())
    if len(given) != count:
        raise DataError(f"{len(given)} intrinsics for {count} views; give one for all, or one for each")
    return given


def _is_user(frame: str) -> bool:
    return choice("frame", frame, ("dataset", "user")) == "user"


def _options(options: Any, kind: type[Options]) -> Options | None:
    """Options of that kind or none; ConfigError for anything else."""
    if options is not None and not isinstance(options, kind):
        raise ConfigError(
            f"options {shown(options)}: expected {kind.__name__}; dataclasses.replace changes a part of it"
        )
    return options


def _as_list(images: Any, channels: bool = True) -> list[Picture]:
    """One picture or several, as a list; DataError if there are none. An array without channels may be a mask."""
    if isinstance(images, Tensor | np.ndarray):
        several = images.ndim == 4 or (images.ndim == 3 and not channels)
        images = list(images) if several else [images]
    elif not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise DataError("no pictures; give one or more")
    return list(images)
