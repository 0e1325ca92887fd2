"""Read poses off pictures with a run's model, by the estimator that the settings name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sitdist.config.experiment import EvaluateConfig
from sitdist.dataset.manifest import DatasetManifest
from sitdist.errors import ConfigError
from sitdist.flow.choices import FIXED_STEP
from sitdist.flow.estimate import EstimateOptions, PoseEstimate
from sitdist.flow.readout import read_camera
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import project_to_so3
from sitdist.geometry.resample import zoomed
from sitdist.inference.options import build_latent_estimate
from sitdist.inference.preprocess import stated_background
from sitdist.inference.refine import SceneRefiner
from sitdist.inference.run import LoadedRun
from sitdist.model.codec import latent_mean

LEAST_VARIANCE = 1e-12  # of standardized entries: below it, all estimates are as good


@dataclass(frozen=True)
class PoseReader:
    """Reads poses off pictures with a run's model; `open` checks the settings.

    options: how a latent is read. zooms: read every picture at all of them, with `background` [3] around one that is
    made smaller; None reads its latent. refiner: of the scene by which poses are refined. guidance: scale and channels
    of the one that `exact` undoes.
    """

    loaded: LoadedRun
    options: EstimateOptions
    zooms: tuple[float, ...] | None = None
    background: Tensor | None = None
    refiner: SceneRefiner | None = None
    guidance: tuple[float, str] | None = None

    @classmethod
    def open(cls, loaded: LoadedRun, settings: EvaluateConfig) -> PoseReader:
        """ConfigError where the estimator, the read-out or the refinement does not fit the run."""
        zooms = tuple(settings.zooms) if settings.estimator == "multi_zoom" else None
        options = build_latent_estimate(settings)
        check_reading(loaded, options, zooms)
        device = next(loaded.model.parameters()).device
        return cls(
            loaded,
            options,
            zooms,
            _background(loaded.manifest, settings),
            None if settings.refine is None else SceneRefiner.open(settings.refine, loaded.manifest, device),
            None if settings.guidance is None else (settings.guidance, settings.guidance_channels),
        )

    def estimate(self, images: Tensor, moments: Tensor, labels: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """What `read` and then `refined` give."""
        return self.refined(self.read(images, moments, labels, intrinsics), images, intrinsics)

    def refined(self, estimate: PoseEstimate, images: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """The estimate after the scene has moved it; the same where there is no scene."""
        return estimate if self.refiner is None else self.refiner.refine(estimate, images, intrinsics)

    def read(self, images: Tensor, moments: Tensor, labels: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """Poses of pictures [B, 3, H, W] with latent moments [B, 2C, h, w], labels [B], normalized intrinsics [B, 4].

        All are on the model's device.
        """
        if self.zooms is None:
            return self._of_moments(moments, labels)
        return self._multi_zoom(self.zooms, images, labels, intrinsics)

    def _of_moments(self, moments: Tensor, labels: Tensor) -> PoseEstimate:
        guidance = self.guidance if self.options.estimator == "exact" else None
        return self.loaded.estimate(latent_mean(moments), labels, self.options, guidance)

    def _multi_zoom(self, zooms: tuple[float, ...], images: Tensor, labels: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """The mean over several zooms of every picture, each moved back to the true distance.

        Zoomed by z, a picture is that of a camera at radius r / z, so that its estimate's position counts z times. A
        zoom weighs as one over the square of its variance, which tells zooms that the model knows from those that it
        does not.
        """
        estimates = []
        for zoom in zooms:
            estimate = self._of_moments(self._encoded(images, zoom, intrinsics), labels)
            camera_to_world = estimate.camera_to_world.clone()
            camera_to_world[:, :3, 3] *= zoom
            estimates.append(replace(estimate, camera_to_world=camera_to_world))
        return combined(estimates, self.loaded.statistics, self.options.readout)

    def _encoded(self, images: Tensor, zoom: float, intrinsics: Tensor) -> Tensor:
        if zoom != 1.0:
            height, width = images.shape[-2:]
            background = torch.zeros(3) if self.background is None else self.background  # none is seen beyond 1
            centres = [(float(cx * width), float(cy * height)) for cx, cy in intrinsics[:, 2:].tolist()]
            pictures = [
                zoomed(picture, zoom, centre, background) for picture, centre in zip(images.cpu(), centres, strict=True)
            ]
            images = torch.stack(pictures).to(images.device)
        return self.loaded.codec.encode_moments(images)


def combined(estimates: list[PoseEstimate], statistics: PoseStatistics, readout: str) -> PoseEstimate:
    """One estimate of several of the same views: the mean of their cameras, read out anew.

    Each weighs as the spread of its entries to the power of -4; the residual is that of the mean of the rotations, and
    so tells how far the estimates disagree.
    """
    variance = torch.stack([estimate.spread.square().mean(dim=(1, 2)) for estimate in estimates])  # [K, B]
    weights = (variance / variance.amin(dim=0).clamp_min(LEAST_VARIANCE)).clamp_min(1.0) ** -2
    weights = weights / weights.sum(dim=0)

    def mean(name: str) -> Tensor:
        values = torch.stack([getattr(estimate, name) for estimate in estimates])
        return (weights.reshape(*weights.shape, *[1] * (values.ndim - 2)) * values).sum(dim=0)

    camera_to_world, spread = mean("camera_to_world"), mean("spread")
    intrinsics = None if estimates[0].intrinsics is None else mean("intrinsics")
    packed_pose = standardize(camera_to_world, statistics, intrinsics)
    rotation = camera_to_world[:, :3, :3]
    return PoseEstimate(
        camera_to_world=read_camera(packed_pose, statistics, readout),
        packed_pose=packed_pose,
        function_evaluations=torch.stack([estimate.function_evaluations for estimate in estimates]).sum(dim=0),
        spread=spread,
        so3_residual=torch.linalg.matrix_norm(rotation - project_to_so3(rotation)),
        converged=torch.stack([estimate.converged for estimate in estimates]).all(dim=0),
        intrinsics=intrinsics,
    )


def check_reading(loaded: LoadedRun, options: EstimateOptions, zooms: Sequence[float] | None) -> None:
    """ConfigError where the run's poses cannot be read in this way."""
    estimator, why_no_picture = options.estimator, loaded.config.flow.why_no_picture()
    if why_no_picture and estimator != "one_step":
        raise ConfigError(f"estimator '{estimator}': {why_no_picture}, and knows no other times; use one_step")
    if estimator == "exact" and options.generator not in FIXED_STEP:
        raise ConfigError(
            f"estimator 'exact' undoes the generator step by step, and {options.generator} has no steps of its own; "
            f"set evaluate.generator to one of {', '.join(FIXED_STEP)}"
        )
    cameras = loaded.manifest.splits["train"].cameras
    if options.readout == "look_at" and not (cameras and cameras.looks_at_origin and cameras.upright):
        raise ConfigError(
            "readout 'look_at': not all training cameras look at the origin upright, as the manifest says; use svd"
            if cameras
            else "readout 'look_at': the manifest, of an older format, does not say whether all training "
            "cameras look at the origin upright; build the dataset again, or use svd"
        )
    if zooms is not None and not (cameras and cameras.looks_at_origin):
        raise ConfigError(
            "estimator 'multi_zoom': a zoom is a camera moved towards the origin only where all training "
            "cameras look at it, and the manifest does not say so; use one_step"
        )


def _background(manifest: DatasetManifest, settings: EvaluateConfig) -> Tensor | None:
    """The colour [3] around a picture that is made smaller; None where no zoom makes it so."""
    if settings.estimator != "multi_zoom" or min(settings.zooms) >= 1.0:
        return None
    colour: Sequence[float] | None = settings.background
    for source in manifest.train_sources():
        colour = colour or stated_background(source)
    if colour is None:
        raise ConfigError(
            f"evaluate.zooms = {settings.zooms} make pictures smaller, and the recipe does not tell the background "
            "around them; set evaluate.background, such as [1, 1, 1]"
        )
    return torch.tensor(colour, dtype=torch.float32)
