"""The pose of a picture, read off its latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sitdist import checks
from sitdist.flow.choices import GENERATORS, LATENT_ESTIMATORS, READOUTS
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.readout import read_camera
from sitdist.flow.solve import (
    MOST_STEPS,
    Inversion,
    Model,
    function_evaluations,
    invert,
    invert_at_arrival,
    invert_exactly,
)
from sitdist.geometry.packing import PoseStatistics, entries, packed_intrinsics
from sitdist.geometry.pose import project_to_so3

SOURCE_STEPS = 249


@dataclass(frozen=True)
class EstimateOptions:
    """How poses are read off latents.

    `one_step` is the posterior mean at t = 1. `euler`, `heun` and `midpoint` integrate backward on `steps` intervals;
    `euler_249` is the protocol of the work this system comes from: 249 explicit Euler steps, velocity at the time of
    arrival. `exact` undoes `generator` with `generator_steps` steps, each of which is solved to `tolerance` by at most
    `max_iterations`. `readout`: how a rigid pose is fitted to the sixteen entries, one of READOUTS.
    """

    estimator: str = "one_step"
    steps: int = 50
    generator: str = "heun"
    generator_steps: int = 10
    tolerance: float = 2e-6
    max_iterations: int = 50
    readout: str = "svd"

    def __post_init__(self) -> None:
        checks.choice("estimator", self.estimator, LATENT_ESTIMATORS)
        checks.choice("readout", self.readout, READOUTS)
        checks.choice("estimator generator", self.generator, GENERATORS)
        for name in ("steps", "generator_steps", "max_iterations"):
            checks.whole(f"estimator {name}", getattr(self, name), 1, MOST_STEPS)
        checks.number("estimator tolerance", self.tolerance, 1e-30)


@dataclass(frozen=True)
class PoseEstimate:
    """Poses read off B latents.

    camera_to_world: [B, 4, 4] float64, rigid.
    packed_pose: [B, 4, 4] float64, as unpacked from x0.
    function_evaluations: [B] int64, of the model.
    spread: [B, 4, 4], the standard error of every entry of packed_pose, in its units: the deviation over the places of
        the latent that hold the entry, over the root of their number.
    so3_residual: [B], the Frobenius distance of the unprojected rotation to the nearest one; 0 for a perfect flow.
    converged: [B] bool; False where an iteration stopped short of its tolerance, or a scene does not explain a picture.
    intrinsics: fx / width, fy / height, cx / width, cy / height, [B, 4] float64, where the dataset packs them.
    rotation_std_deg, translation_std, trust: [B], where a calibration fills them: root mean square errors, in degrees
        and in the dataset's units, of pictures like this one; and how usual the picture and its estimate are, from 0 to
        1: the share of held-out training-like views that look at least as odd.
    rotation_bars_deg, translation_bars: [B, 2], with these: radii that hold the error with 50% and 90%.
    picture_error: [B], of poses refined by a scene: the root mean square difference of the picture to the scene's.
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
    picture_error: Tensor | None = None

    @classmethod
    def concatenated(cls, estimates: Sequence[PoseEstimate]) -> PoseEstimate:
        """The estimates of several batches as one."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(each, field.name) for each in estimates]
            values[field.name] = None if parts[0] is None else torch.cat(parts)
        return cls(**values)

    def cpu(self) -> PoseEstimate:
        """The same on the CPU."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = None if value is None else value.cpu()
        return PoseEstimate(**values)


def posterior_mean_x0(model: Model, interpolant: Interpolant, x1: Tensor, y: Tensor) -> Tensor:
    """E[x0 | x1] [B, C, h, w] by one evaluation at t = 1: the pose with the endpoint's noise averaged out."""
    t = torch.full((len(x1),), interpolant.t_one, dtype=x1.dtype, device=x1.device)
    return interpolant.posterior_x0(model(x1, t, y), x1, t)


@torch.no_grad()
def estimate_pose(
    model: Model,
    interpolant: Interpolant,
    latent: Tensor,
    y: Tensor,
    statistics: PoseStatistics,
    options: EstimateOptions = EstimateOptions(),
    endpoint: Endpoint = Endpoint(),  # noqa: B008
) -> PoseEstimate:
    """Estimate the poses of latents [B, C, h, w] of objects `y` [B], which the flow ends in at `endpoint`.

    No noise is subtracted: an estimator cannot know it.
    """
    solved = _solve(model, interpolant, latent, y, options)
    return read_pose(solved.x0, statistics, endpoint, solved.function_evaluations, solved.converged, options.readout)


def _solve(model: Model, interpolant: Interpolant, latent: Tensor, y: Tensor, options: EstimateOptions) -> Inversion:
    """x0 of the latents by the estimator that the options name."""
    match options.estimator:
        case "one_step":
            x0, evaluations = posterior_mean_x0(model, interpolant, latent, y), 1
        case "euler_249":
            x0, evaluations = invert_at_arrival(model, interpolant, latent, y, SOURCE_STEPS), SOURCE_STEPS
        case "exact":
            return invert_exactly(
                model,
                interpolant,
                latent,
                y,
                options.generator,
                options.generator_steps,
                options.tolerance,
                options.max_iterations,
            )
        case _:
            x0 = invert(model, interpolant, latent, y, options.estimator, options.steps)
            evaluations = function_evaluations(options.estimator, options.steps)
    return Inversion(x0, torch.ones_like(y, dtype=torch.bool), torch.full_like(y, evaluations, dtype=torch.int64))


def read_pose(
    x0: Tensor,
    statistics: PoseStatistics,
    endpoint: Endpoint,
    evaluations: Tensor,
    converged: Tensor | None = None,
    readout: str = "svd",
) -> PoseEstimate:
    """The poses in x0 [B, C, h, w], found by `evaluations` [B] of the model."""
    packed_pose, spread = endpoint.packed_pose(x0.double()), endpoint.spread(x0.double())
    rotation = entries(packed_pose, statistics)[:, :3, :3]
    return PoseEstimate(
        camera_to_world=read_camera(packed_pose, statistics, readout),
        packed_pose=packed_pose,
        function_evaluations=evaluations,
        spread=spread,
        so3_residual=torch.linalg.matrix_norm(rotation - project_to_so3(rotation)),
        converged=torch.ones_like(evaluations, dtype=torch.bool) if converged is None else converged,
        intrinsics=packed_intrinsics(packed_pose, statistics),
    )
