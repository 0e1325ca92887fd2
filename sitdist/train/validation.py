"""How good the averaged weights are on the validation views, measured while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sitdist.config.experiment import Config
from sitdist.dataset.manifest import DatasetManifest
from sitdist.dataset.reader import ShardReader
from sitdist.distributed.ranks import Ranks
from sitdist.errors import ConfigError
from sitdist.flow.estimate import estimate_pose
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.predict import velocity_model
from sitdist.flow.sample import sample_latents
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.inference.options import build_sampling
from sitdist.model.codec import Codec, latent_mean, psnr
from sitdist.runs.build import build_endpoint
from sitdist.train.hooks import Hook, StepResult
from sitdist.train.monitor import Monitor


@dataclass(frozen=True)
class ValidationResult:
    """What could be measured: pose errors over the views, and the mean PSNR in dB of generated views.

    `picture` [3, H, W] shows rows of generated views above the true ones.
    """

    scalars: dict[str, float]
    picture: Tensor | None
    rotation_errors_deg: Tensor | None = None  # [views]


class Validation:
    """The first views of the `val` split in memory: their latents, poses and pictures; the main process has them."""

    def __init__(self, config: Config, dataset: Path, manifest: DatasetManifest, codec: Codec, device: torch.device):
        views = manifest.splits["val"].count if "val" in manifest.splits else 0
        if views == 0:
            raise ConfigError(
                f"train.validate_every = {config.train.validate_every}: {dataset} has no validation views; "
                "build it with val_views above 0, or remove train.validate_every"
            )
        reader = ShardReader(dataset, "val")
        indices = list(range(min(views, config.train.validation_views)))
        pictured = indices[: config.train.picture_views]
        self._config, self._codec, self._device = config, codec, device
        self._endpoint = build_endpoint(config.flow)
        self.interpolant = get_interpolant(config.flow.path, config.flow.prediction)
        self._statistics = PoseStatistics.from_dict(manifest.statistics)
        moments, packed_poses = reader.moments_and_poses(indices)
        self._latents = latent_mean(moments.float()).to(device)
        self._camera_to_world = reader.camera_to_world()[indices].to(device)
        self._labels = reader.labels()[indices].to(device)
        self._packed_poses = packed_poses[: len(pictured)].to(device)
        self._images = reader.images(pictured)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> ValidationResult:
        """One-step pose errors and generated views of `model`."""
        flow = self._config.flow
        model = velocity_model(model, self.interpolant, flow.prediction)
        scalars, rotation = self._pose_errors(model) if flow.why_no_pose() is None else ({}, None)
        if flow.why_no_picture() is not None:
            return ValidationResult(scalars, None, rotation)
        from torchvision.utils import make_grid

        generated = self._generate(model)
        scalars["psnr"] = float(psnr(generated, self._images).mean())
        picture = make_grid(torch.cat([generated, self._images]), nrow=len(generated))
        return ValidationResult(scalars, picture, rotation)

    def _pose_errors(self, model: nn.Module) -> tuple[dict[str, float], Tensor]:
        batch, endpoint = self._config.evaluate.batch, self._endpoint
        estimates = [
            estimate_pose(model, self.interpolant, latents, labels, self._statistics, endpoint=endpoint).camera_to_world
            for latents, labels in zip(self._latents.split(batch), self._labels.split(batch), strict=True)
        ]
        estimated = torch.cat(estimates)
        rotation = rotation_error_deg(estimated[:, :3, :3], self._camera_to_world[:, :3, :3])
        translation = translation_error(estimated, self._camera_to_world)
        scalars = {
            "rotation_error_deg": float(rotation.mean()),
            "rotation_error_deg_median": float(rotation.median()),
            "translation_error": float(translation.mean()),
            "translation_error_median": float(translation.median()),
        }
        return scalars, rotation

    def _generate(self, model: nn.Module) -> Tensor:
        """Pictures [B, 3, H, W] of the first views' poses."""
        count = len(self._packed_poses)
        latents = sample_latents(
            model,
            self.interpolant,
            self._endpoint,
            self._packed_poses,
            self._labels[:count],
            self._latents.shape[1:],
            build_sampling(self._config.evaluate),
            self._config.seed,
            "validation",
            torch.arange(count, device=self._device),
        )
        return self._codec.decode(latents).float().cpu()


class PeriodicValidation(Hook):
    """Validates and logs every `every` steps, and after the last; `validation` is None but on the main process.

    `averaged_model` gives the full averaged model; every process calls it.
    """

    def __init__(
        self,
        every: int | None,
        validation: Validation | None,
        averaged_model: Callable[[], nn.Module],
        ranks: Ranks,
        monitor: Monitor,
    ) -> None:
        self._every, self.validation, self._averaged_model = every, validation, averaged_model
        self._ranks, self._monitor = ranks, monitor

    def after_step(self, done: StepResult) -> None:
        if not done.due(self._every):
            return
        begun = time.perf_counter()
        model = self._averaged_model()
        with self._ranks.raise_together():
            if self.validation is not None:
                self._log(done.step, self.validation.measure(model))
        self._monitor.observe_validation(time.perf_counter() - begun)

    def _log(self, step: int, result: ValidationResult) -> None:
        self._monitor.write_scalars(step, result.scalars, "validation")
        if result.picture is not None:
            self._monitor.write_picture(step, "validation/generated_above_true", result.picture)
        if result.rotation_errors_deg is not None:
            self._monitor.write_error_curve(step, "validation/rotation_errors", result.rotation_errors_deg)
