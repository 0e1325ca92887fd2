"""What experiments share: the model with its settings, and the route between poses and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.config.experiment import EvaluateConfig
from sitdist.config.recipe import SceneSource
from sitdist.evaluate import metrics
from sitdist.evaluate.measures import measures_of, write_records
from sitdist.evaluate.statistics import summarize_all
from sitdist.evaluate.views import ViewBatch, ViewRef, Views
from sitdist.flow import draws
from sitdist.flow.estimate import EstimateOptions, PoseEstimate
from sitdist.flow.solve import generate
from sitdist.geometry.camera import Intrinsics
from sitdist.inference.calibration import RunCalibration
from sitdist.inference.options import build_estimate, build_sampling
from sitdist.inference.run import LoadedRun
from sitdist.io.files import write_json
from sitdist.model.codec import latent_mean
from sitdist.scene.views import open_scene, render


@dataclass(frozen=True)
class Tools:
    """A run, its settings, the views that it is evaluated on, and the scene (if any) that they come from.

    `training_poses` [N, 4, 4]; `focal`: normalized intrinsics [4], the median of the training cameras.
    """

    loaded: LoadedRun
    settings: EvaluateConfig
    views: Views
    scene: SceneSource | None
    training_poses: Tensor
    focal: Tensor
    lpips: metrics.Lpips | None
    calibration: RunCalibration | None
    device: torch.device

    def load(self, views: Sequence[ViewRef]) -> ViewBatch:
        """Views of any bins as one batch, on the device."""
        parts = [self.views.load((view,)) for view in views]
        columns = [[getattr(part, field.name) for part in parts] for field in fields(ViewBatch)]
        return ViewBatch(*(torch.cat(column).to(self.device) for column in columns))

    @cached_property
    def references(self) -> list[ViewRef]:
        return self.views.references()

    @cached_property
    def label(self) -> int:
        """The label of the scene's object, or else of the first view."""
        return self.scene.label if self.scene else int(self.views.load((self.references[0],)).labels[0])

    def intrinsics(self, count: int) -> Tensor:
        """Normalized intrinsics [count, 4]."""
        return self.focal.to(self.device).expand(count, 4)

    @torch.no_grad()
    def read(self, latents: Tensor, labels: Tensor, options: EstimateOptions | None = None) -> Tensor:
        """Poses [B, 4, 4] read off latents [B, C, h, w]."""
        return self.loaded.estimate(latents, labels, options or build_estimate(self.settings)).camera_to_world

    @torch.no_grad()
    def estimate(self, latents: Tensor, labels: Tensor) -> PoseEstimate:
        """Poses read off latents [B, C, h, w], with error bars and trust where the run is calibrated."""
        estimate = self.loaded.estimate(latents, labels, build_estimate(self.settings))
        return estimate if self.calibration is None else self.calibration.fill(self.loaded, estimate, latents, labels)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latent means [B, C, h, w] of pictures [B, 3, H, W]."""
        return latent_mean(self.loaded.codec.encode_moments(images))

    @torch.no_grad()
    def render(
        self, poses: Tensor, intrinsics: Tensor, labels: Tensor, stream: str, positions: Tensor, **changes: Any
    ) -> Tensor:
        """Pictures [B, 3, H, W] that the model renders from poses [B, 4, 4]; noise by (seed, stream, position)."""
        options, seed = build_sampling(self.settings.model_copy(update=changes)), self.settings.seed
        poses, positions = poses.to(self.device), positions.to(self.device)
        return self.loaded.render(poses, intrinsics, labels, options, seed, stream, positions)

    def noise(self, stream: str, positions: Tensor) -> Tensor:
        """Standard normal noise [B, C, h, w] of the latents' shape."""
        shape = self.loaded.latent_shape
        return draws.normal(self.settings.seed, stream, positions.to(self.device), math.prod(shape)).reshape(-1, *shape)

    @torch.no_grad()
    def follow(self, x0: Tensor, labels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] that the ODE makes of x0 [B, C, h, w] with a pose in it."""
        loaded, settings = self.loaded, self.settings
        latents = generate(loaded.model, loaded.interpolant, x0, labels, settings.generator, settings.generator_steps)
        return loaded.codec.decode(latents)

    def look(self, poses: Tensor) -> Tensor | None:
        """True pictures [B, 3, H, W] from poses [B, 4, 4] with the training intrinsics; None without a scene."""
        if self.scene is None:
            return None
        scene, size = open_scene(self.scene.scene), self.loaded.manifest.image_size
        fx, fy, cx, cy = (float(value) * size for value in self.focal)
        camera = Intrinsics(fx, fy, cx, cy, size, size)
        look = self.scene.supersample, self.scene.background
        return torch.stack([render(scene, pose, camera, *look) for pose in poses.cpu()]).to(self.device)


def row_major(poses: Tensor) -> list[list[float]]:
    """The upper three rows of poses [B, 4, 4], row by row."""
    return poses[:, :3].flatten(1).tolist()


def write_results(folder: Path, result: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """results.json, and records.csv with a row for every record."""
    write_records(folder / "records.csv", records)
    write_json(folder / "results.json", result)


def summaries(records: Sequence[dict[str, Any]], record: type) -> dict[str, Any]:
    """Summaries of the measures of records of the class `record`, over those that have them."""
    measures = measures_of(record)
    return summarize_all(measures, {name: [each[name] for each in records] for name in measures})


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced, the first and the last included; all of them if there are fewer."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in chosen]
