"""The pose of a picture, read off its latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.path import Path
from sitdist.flow.solve import Model, function_evaluations, invert, invert_at_arrival
from sitdist.geometry.packing import PoseStatistics, destandardize, entries, packed_intrinsics

SOURCE_STEPS = 249
ESTIMATORS = ("one_step", "euler", "heun", "midpoint", "source")


@dataclass(frozen=True)
class EstimateOptions:
    """How poses are read off latents.

    `one_step` is the posterior mean; `euler`, `heun` and `midpoint` integrate backward on `steps` intervals; `source`
    is the protocol of the work this system comes from: 249 explicit Euler steps, velocity at the time of arrival.
    """

    estimator: str = "one_step"
    steps: int = 50

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator '{self.estimator}': unknown; choose one of {', '.join(ESTIMATORS)}")
        if self.steps < 1:
            raise ConfigError(f"estimator steps {self.steps}: should be 1 or more")


@dataclass(frozen=True)
class PoseEstimate:
    """Poses read off B latents.

    camera_to_world: [B, 4, 4] float64, rigid.
    packed_pose: [B, 4, 4] float64, as unpacked from x0.
    function_evaluations: [B] int64, of the model.
    spread: [B, 4, 4], the standard error of every entry of packed_pose, in its units: the deviation over the places of
        the latent that hold the entry, over the root of their number.
    so3_residual: [B], the Frobenius distance of the unprojected rotation to the nearest one; 0 for a perfect flow.
    converged: [B] bool; False where an iteration stopped short of its tolerance.
    intrinsics: fx / width, fy / height, cx / width, cy / height, [B, 4] float64, where the dataset packs them.
    rotation_std_deg, translation_std, trust: [B], where a calibration fills them: root mean square errors, in degrees
        and in the dataset's units, of pictures like this one; and how usual the picture and its estimate are, from 0 to
        1: the share of held-out training-like views that look at least as odd.
    rotation_bars_deg, translation_bars: [B, 2], with these: radii that hold the error with 50% and 90%.
    """

    camera_to_world: Tensor
    packed_pose: Tensor
    function_evaluations: Tensor
    spread: Tensor
    so3_residual: Tensor
    converged: Tensor
    intrinsics: Tensor | None = None
    rotation_std_deg: Tensor | None = None
    translation_std: Tensor | None = None
    trust: Tensor | None = None
    rotation_bars_deg: Tensor | None = None
    translation_bars: Tensor | None = None


def posterior_mean_x0(model: Model, path: Path, x1: Tensor, y: Tensor) -> Tensor:
    """E[x0 | x1] [B, C, h, w] by one evaluation at t = 1: the pose with the endpoint's noise averaged out."""
    t = torch.full((len(x1),), path.t_one, dtype=x1.dtype, device=x1.device)
    return path.posterior_x0(model(x1, t, y), x1, t)


@torch.no_grad()
def estimate_pose(
    model: Model,
    path: Path,
    latent: Tensor,
    y: Tensor,
    statistics: PoseStatistics,
    options: EstimateOptions = EstimateOptions(),
    endpoint: Endpoint = Endpoint(),  # noqa: B008
) -> PoseEstimate:
    """Estimate the poses of latents [B, C, h, w] of objects `y` [B], which the flow ends in at `endpoint`.

    No noise is subtracted: an estimator cannot know it.
    """
    if options.estimator == "one_step":
        x0, evaluations = posterior_mean_x0(model, path, latent, y), 1
    elif options.estimator == "source":
        x0, evaluations = invert_at_arrival(model, path, latent, y, SOURCE_STEPS), SOURCE_STEPS
    else:
        x0 = invert(model, path, latent, y, options.estimator, options.steps)
        evaluations = function_evaluations(options.estimator, options.steps)
    return read_pose(x0, statistics, endpoint, torch.full_like(y, evaluations, dtype=torch.int64))


def read_pose(
    x0: Tensor, statistics: PoseStatistics, endpoint: Endpoint, evaluations: Tensor, converged: Tensor | None = None
) -> PoseEstimate:
    """The poses in x0 [B, C, h, w], found by `evaluations` [B] of the model."""
    packed_pose = endpoint.packed_pose(x0.double())
    camera_to_world = destandardize(packed_pose, statistics)
    off = (entries(packed_pose, statistics) - camera_to_world)[:, :3, :3]
    return PoseEstimate(
        camera_to_world=camera_to_world,
        packed_pose=packed_pose,
        function_evaluations=evaluations,
        spread=endpoint.spread(x0.double()),
        so3_residual=torch.linalg.matrix_norm(off),
        converged=torch.ones_like(evaluations, dtype=torch.bool) if converged is None else converged,
        intrinsics=packed_intrinsics(packed_pose, statistics),
    )
