"""How good the averaged weights are on the validation views, while training goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sitdist.config import Config
from sitdist.data.format import DatasetManifest
from sitdist.data.reader import ShardReader
from sitdist.errors import ConfigError
from sitdist.flow import draws
from sitdist.flow.endpoint import pose_endpoint
from sitdist.flow.estimate import estimate_pose
from sitdist.flow.path import Path as FlowPath
from sitdist.flow.path import get_path
from sitdist.flow.predict import velocity_model
from sitdist.flow.solve import generate
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.model.codec import Codec, latent_mean


@dataclass(frozen=True)
class ValidationResult:
    """Pose errors over the views, and a picture [3, H, W]: rows of generated views above the true ones."""

    scalars: dict[str, float]
    picture: Tensor


class Validation:
    """The first views of the `val` split, held in memory: their latents, poses and pictures."""

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
        self._statistics = PoseStatistics.from_dict(manifest.statistics)
        moments, packed_poses = reader.moments_and_poses(indices)
        self._latents = latent_mean(moments.float()).to(device)
        self._camera_to_world = reader.camera_to_world()[indices].to(device)
        self._labels = reader.labels()[indices].to(device)
        self._packed_poses = packed_poses[: len(pictured)].to(device)
        self._images = reader.images(pictured)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> ValidationResult:
        """One-step pose errors and generated views of `model`; one process is enough."""
        flow, batch = self._config.flow, self._config.evaluate.batch
        path = get_path(flow.path, flow.prediction)
        model = velocity_model(model, path, flow.prediction)
        estimates = [
            estimate_pose(model, path, latents, labels, self._statistics).camera_to_world
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
        return ValidationResult(scalars, self._picture(model, path))

    def _picture(self, model: nn.Module, path: FlowPath) -> Tensor:
        from torchvision.utils import make_grid

        count, shape = len(self._packed_poses), self._latents.shape[1:]
        positions = torch.arange(count, device=self._device)
        noise = draws.normal(self._config.seed, "validation", positions, shape.numel()).reshape(-1, *shape)
        x0 = pose_endpoint(self._packed_poses, noise, self._config.flow.sigma)  # [B, C, h, w]
        settings = self._config.evaluate
        latents = generate(
            model,
            path,
            x0,
            self._labels[:count],
            settings.generator,
            settings.generator_steps,
        )
        generated = self._codec.decode(latents).float().cpu()
        return make_grid(torch.cat([generated, self._images]), nrow=count)
