"""Measure the views of an evaluation: the pose read off each, the view rendered from its pose, and the baselines.

The route of one view: picture -> latent -> `estimate_pose` -> pose error; pose -> `generate` -> decode -> MAE, PSNR,
SSIM, LPIPS.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

import sitdist
from sitdist.config.experiment import EvaluateConfig
from sitdist.dataset.reader import ShardReader
from sitdist.evaluate import metrics
from sitdist.evaluate.baselines import LATENTS_AT_MOST, NoiseFloor, TrainingViews, constant_pose, noise_floor
from sitdist.evaluate.measures import RECORD, ViewRecord, make_records, write_records
from sitdist.evaluate.statistics import label_rows, summary_rows
from sitdist.evaluate.tasks import Task
from sitdist.evaluate.views import Unit, Views, merge_pictures, pictured, to_uint8
from sitdist.flow.estimate import PoseEstimate
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference import calibration as calibrate
from sitdist.inference.options import build_sampling
from sitdist.inference.pose_reader import PoseReader
from sitdist.inference.run import LoadedRun
from sitdist.io.arrays import save_arrays
from sitdist.io.files import write_json
from sitdist.model.codec import latent_mean, psnr


@dataclass(frozen=True)
class ViewEvaluator:
    """Everything an evaluation needs, the same on every process; `title` is the split, or the radii rendered for it."""

    run: Path
    out: Path
    data: Path
    title: str
    loaded: LoadedRun
    calibration: calibrate.RunCalibration | None
    why_uncalibrated: str
    settings: EvaluateConfig
    poses: PoseReader
    views: Views
    units: list[Unit]
    training: ShardReader
    lpips: metrics.Lpips | None
    background: Tensor | None
    plan: dict[str, Any]
    device: torch.device
    record: ClassVar[TypeAdapter[Any]] = RECORD

    @cached_property
    def training_views(self) -> TrainingViews:
        """At most LATENTS_AT_MOST training views by stride; loaded by the first unit that a process measures."""
        indices = list(range(0, len(self.training), self._training_stride))
        chunks = [indices[start : start + 1024] for start in range(0, len(indices), 1024)]
        latents = torch.cat([latent_mean(self.training.moments(chunk).float()) for chunk in chunks])
        camera_to_world, labels = self.training.camera_to_world()[indices], self.training.labels()[indices]
        return TrainingViews(latents.to(self.device), camera_to_world.to(self.device), labels.to(self.device))

    @property
    def _training_stride(self) -> int:
        return math.ceil(len(self.training) / LATENTS_AT_MOST)

    @cached_property
    def constant_pose(self) -> Tensor:
        return constant_pose(self.training.camera_to_world()).to(self.device)

    def tasks(self) -> list[Task]:
        """One of every unit."""
        return [Task(unit.name, tuple(view.key for view in unit.views), len(unit.views)) for unit in self.units]

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Records of a unit's views, and key, true and rendered of its first and its worst ones."""
        unit = self.units[int(task.name.removeprefix("unit_"))]
        records, true, rendered = self._measure(unit)
        shown = pictured(unit, records)
        pictures = {"key": np.array([task.keys[i] for i in shown]), "true": true[shown]}
        return [asdict(record) for record in records], (
            pictures if rendered is None else pictures | {"rendered": rendered[shown]}
        )

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        """Write records.csv (one row a view, sorted by key), images.npz and metrics.json."""
        found = [ViewRecord(**record) for record in records]
        write_records(self.out / "records.csv", [record.row() for record in found])
        save_arrays(self.out / "images.npz", merge_pictures(arrays, self.units))
        self.write_summary(found)

    @torch.no_grad()
    def _measure(self, unit: Unit) -> tuple[list[ViewRecord], np.ndarray, np.ndarray | None]:
        """Records of the unit's views, and true and rendered pictures [B, H, W, 3] uint8.

        What the model cannot do is not measured.
        """
        codec = self.loaded.codec
        views = self.views.load(unit.views)
        images, moments = views.images.to(self.device), views.moments.to(self.device)
        true, labels = views.camera_to_world.to(self.device), views.labels.to(self.device)
        intrinsics, latents = views.intrinsics.to(self.device), latent_mean(moments)

        ceiling = codec.decode(latents)
        nearest = self.training_views.nearest_by_latent(latents, labels)
        nearest_images = codec.decode(self.training_views.nearest_by_camera(true, labels))
        values: dict[str, Tensor | list[float | None]] = {
            "codec_mae": metrics.mean_absolute_error(ceiling, images),
            "codec_psnr": psnr(ceiling, images),
            "codec_ssim": metrics.ssim(ceiling, images),
            "constant_rotation_error_deg": rotation_error_deg(self.constant_pose[:3, :3], true[:, :3, :3]),
            "constant_translation_error": translation_error(self.constant_pose, true),
            "nearest_rotation_error_deg": rotation_error_deg(nearest[:, :3, :3], true[:, :3, :3]),
            "nearest_translation_error": translation_error(nearest, true),
            "nearest_psnr": psnr(nearest_images, images),
            "codec_object_psnr": self._object_psnr(ceiling, images),
            "label": labels,
            "true": true[:, :3].flatten(1),
        }
        flow, rendered = self.loaded.config.flow, None
        if flow.why_no_pose() is None:
            values |= self._pose_errors(self._estimate(images, moments, labels, intrinsics), true, intrinsics)
        if flow.why_no_picture() is None:
            positions = torch.tensor([view.position for view in unit.views], device=self.device)
            how = (build_sampling(self.settings), self.settings.seed, "eval", positions)  # of the noise: seed and on
            rendered = self.loaded.render(true, intrinsics, labels, *how)
            values |= self._picture_errors(rendered, images)
        columns = {name: value if isinstance(value, list) else value.tolist() for name, value in values.items()}
        columns |= {name: [getattr(view, name) for view in unit.views] for name in ("key", "radius", "bin")}
        records = [ViewRecord(**values) for values in make_records(ViewRecord, columns)]
        return records, to_uint8(images), None if rendered is None else to_uint8(rendered)

    def _estimate(self, images: Tensor, moments: Tensor, labels: Tensor, intrinsics: Tensor) -> PoseEstimate:
        estimate = self.poses.estimate(images, moments, labels, intrinsics)
        if self.calibration is None:
            return estimate
        return self.calibration.fill(self.loaded, estimate, latent_mean(moments), labels)

    def _pose_errors(self, estimate: PoseEstimate, true: Tensor, intrinsics: Tensor) -> dict[str, Tensor]:
        estimated = estimate.camera_to_world
        values = {
            "rotation_error_deg": rotation_error_deg(estimated[:, :3, :3], true[:, :3, :3]),
            "translation_error": translation_error(estimated, true),
            "estimated": estimated[:, :3].flatten(1),
            "function_evaluations": estimate.function_evaluations,
            "converged": estimate.converged,
        }
        if estimate.trust is not None:
            values |= calibrate.bar_columns(estimate)
        if estimate.intrinsics is not None:
            values["focal_error"] = 100.0 * (estimate.intrinsics[:, 0] / intrinsics[:, 0] - 1.0).abs()
        return values

    def _object_psnr(self, rendered: Tensor, images: Tensor) -> list[float | None]:
        if self.background is None:
            return [None] * len(images)
        return metrics.object_psnr(rendered, images, self.background)

    def _picture_errors(self, rendered: Tensor, images: Tensor) -> dict[str, Tensor | list[float | None]]:
        values: dict[str, Tensor | list[float | None]] = {
            "mae": metrics.mean_absolute_error(rendered, images),
            "psnr": psnr(rendered, images),
            "object_psnr": self._object_psnr(rendered, images),
            "ssim": metrics.ssim(rendered, images),
        }
        return values if self.lpips is None else values | {"lpips": self.lpips(rendered, images)}

    def write_summary(self, records: list[ViewRecord]) -> None:
        """metrics.json, without rows where there are no records."""
        write_json(self.out / "metrics.json", self._summary(records))

    def _summary(self, records: list[ViewRecord]) -> dict[str, Any]:
        settings, flow, endpoint = self.settings, self.loaded.config.flow, self.loaded.endpoint
        compared = math.ceil(len(self.training) / self._training_stride)
        return {
            "run": str(self.run),
            "step": self.loaded.step,
            "dataset": str(self.data),
            "split": self.title,
            "estimator": settings.estimator,
            "readout": settings.readout,
            "refine": settings.refine,
            "function_evaluations": max((record.function_evaluations or 0 for record in records), default=None),
            "not_converged": sum(record.converged is False for record in records),
            "generator": settings.generator,
            "generator_steps": settings.generator_steps,
            "guidance": settings.guidance,
            "seed": settings.seed,
            "sigma": endpoint.sigma,
            "noise_floor": None if endpoint.kind == "gaussian" else asdict(self._noise_floor()),
            "calibration": self._coverage(records),
            "why_uncalibrated": self.why_uncalibrated or None,
            "no_pose": flow.why_no_pose(),
            "no_picture": flow.why_no_picture(),
            "lpips": metrics.LPIPS_NOT_MEASURED if self.lpips is None else self.lpips.identity(),
            "training_radius": list(self.loaded.manifest.splits["train"].radius),
            "radius_augmented": self.loaded.manifest.splits["train"].radius_augmented,
            "training_views": {"count": len(self.training), "compared": compared, "stride": self._training_stride},
            "versions": {
                "sitdist": sitdist.__version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
            },
            "provenance": self._provenance(),
            "config": self.loaded.config.model_dump(mode="json"),
            "background": None if self.background is None else self.background.tolist(),
            "rows": summary_rows(records) if records else [],
            "labels": label_rows(records, {entry.label: entry.name for entry in self.loaded.manifest.objects}),
        }

    def _coverage(self, records: list[ViewRecord]) -> dict[str, Any] | None:
        """How often the error bars hold on these views."""
        if self.calibration is None or not records:
            return None
        return calibrate.coverage_summary(self.calibration, records)

    def _provenance(self) -> dict[str, str]:
        """What was run on what."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "command": shlex.join(["sitdist", *sys.argv[1:]]),
            "dataset fingerprint": self.plan["dataset"],
            "weights": self.plan["weights"],
            "hardware": f"{self.device.type}, {device}, {os.cpu_count()} processors",
            "system": platform.platform(),
        }

    def _noise_floor(self) -> NoiseFloor:
        loaded, poses = self.loaded, self.training.camera_to_world()
        sigma = loaded.endpoint.sigma / loaded.endpoint.gain
        return noise_floor(poses, loaded.statistics, sigma, loaded.latent_shape, self.settings.seed)
