"""The pose of a picture, read off its latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.path import Path
from sitdist.flow.solve import Model, function_evaluations, invert, invert_at_arrival
from sitdist.geometry.packing import PoseStatistics, destandardize, packed_intrinsics

SOURCE_STEPS = 249
ESTIMATORS = ("one_step", "euler", "heun", "midpoint", "source")


@dataclass(frozen=True)
class PoseEstimate:
    """Poses read off B latents: camera_to_world [B, 4, 4] float64 (rigid), packed_pose [B, 4, 4] as unpacked.

    `intrinsics`: fx / width, fy / height, cx / width, cy / height [B, 4] float64, where the dataset packs them.
    """

    camera_to_world: Tensor
    packed_pose: Tensor
    function_evaluations: int
    intrinsics: Tensor | None = None


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
    estimator: str = "one_step",
    steps: int = 50,
    endpoint: Endpoint = Endpoint(),  # noqa: B008
) -> PoseEstimate:
    """Estimate the poses of latents [B, C, h, w] of objects `y` [B], which the flow ends in at `endpoint`.

    `one_step` is the posterior mean; `euler`, `heun` and `midpoint` integrate backward on `steps` intervals; `source`
    is the protocol of the work this system comes from: 249 explicit Euler steps, velocity at the time of arrival.
    No noise is subtracted: an estimator cannot know it.
    """
    if estimator == "one_step":
        x0, evaluations = posterior_mean_x0(model, path, latent, y), 1
    elif estimator == "source":
        x0, evaluations = invert_at_arrival(model, path, latent, y, SOURCE_STEPS), SOURCE_STEPS
    elif estimator in ESTIMATORS:
        x0, evaluations = invert(model, path, latent, y, estimator, steps), function_evaluations(estimator, steps)
    else:
        raise ConfigError(f"estimator '{estimator}': unknown; choose one of {', '.join(ESTIMATORS)}")
    packed_pose = endpoint.packed_pose(x0.double())
    intrinsics = packed_intrinsics(packed_pose, statistics)
    return PoseEstimate(destandardize(packed_pose, statistics), packed_pose, evaluations, intrinsics)
