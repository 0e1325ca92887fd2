"""Error bars and a trust score of an estimated pose, fitted on held-out views.

Every picture has scores that grow with its error and need no true pose: how far the estimated rotation is from SO(3),
how much the places of the latent disagree, and how well the model's own picture of the estimate resembles the input.
Error bars are a monotone function of the scores, scaled so that they hold for the stated share of the held-out views
(split conformal prediction with a fitted scale: Lei et al., "Distribution-free predictive inference for regression",
2018); trust is the conformal p-value of the worst score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.errors import DataError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.estimate import PoseEstimate
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.solve import Model
from sitdist.geometry.packing import PoseStatistics, standardize

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BAR_LEVELS = (0.5, 0.9)  # of the bars that estimates carry
SCORES = ("so3_residual", "rotation_spread", "translation_spread", "render_residual")
FEWEST = 20  # held-out views; below it a bar of 90% is the largest error or the one before
FOLDS = 10
SMALLEST = 1e-12  # of scores and errors, before their logarithms


# ------------------------------------------------------------------------------------------------------------- scores


def rendered_mean(
    model: Model, interpolant: Interpolant, endpoint: Endpoint, statistics: PoseStatistics, estimate: PoseEstimate,
    like: Tensor, labels: Tensor,
) -> Tensor:  # fmt: skip
    """E[x1] of the estimated poses, [B, C, h, w] like `like`, by one evaluation at t = 0 without noise."""
    packed_pose = standardize(estimate.camera_to_world, statistics, estimate.intrinsics)
    x0 = endpoint.x0(packed_pose, torch.zeros_like(like))
    t = torch.full((len(like),), interpolant.t_zero, dtype=like.dtype, device=like.device)
    return interpolant.posterior_x1(model(x0, t, labels), x0, t)


def render_residual(latent: Tensor, rendered: Tensor, scale: Tensor) -> Tensor:
    """Root mean square [B] of latent - rendered [B, C, h, w], in units of `scale` [C, h, w]."""
    return ((latent - rendered) / scale.to(latent)).double().square().flatten(1).mean(1).sqrt()


def pose_scores(estimate: PoseEstimate, statistics: PoseStatistics, residual: Tensor | None) -> Tensor:
    """The logarithms [B, S] of SCORES; without `residual` [B], of all but the last."""
    spread = estimate.spread.double() * statistics.std.to(estimate.spread.device)
    rotation, translation = spread[:, :3, :3].flatten(1), spread[:, :3, 3]
    scores = [estimate.so3_residual, torch.linalg.vector_norm(rotation, dim=1)]
    scores += [torch.linalg.vector_norm(translation, dim=1)]
    scores += [] if residual is None else [residual]
    return torch.stack([score.double() for score in scores], 1).clamp_min(SMALLEST).log()


# ---------------------------------------------------------------------------------------------------------- error bars


@dataclass(frozen=True)
class Bars:
    """An error as a function of scores: exp(intercept + weights . scores), times a factor for each of LEVELS.

    The weights are not negative; `rms` is the factor of the root mean square error.
    """

    intercept: float
    weights: tuple[float, ...]
    factors: tuple[float, ...]
    rms: float

    def typical(self, scores: Tensor) -> Tensor:
        """The typical error [B] of pictures with log scores [B, S]."""
        weights = torch.tensor(self.weights, dtype=torch.float64, device=scores.device)
        return torch.exp(self.intercept + scores @ weights)

    def at(self, scores: Tensor, levels: Sequence[float]) -> Tensor:
        """Radii [B, L] that hold the error with the probabilities `levels`, which are among LEVELS."""
        factors = torch.tensor([self.factors[LEVELS.index(level)] for level in levels], dtype=torch.float64)
        return self.typical(scores)[:, None] * factors.to(scores.device)


def fit_bars(scores: Tensor, errors: Tensor) -> Bars:
    """Bars for errors [N] of pictures with log scores [N, S]: least squares of log errors, then conformal factors.

    The factors are quantiles of what is left when each of FOLDS parts is predicted from the others, so that they know
    of the fit's own error. DataError for fewer than FEWEST pictures.
    """
    if len(errors) < FEWEST:
        raise DataError(f"{len(errors)} views: too few to calibrate error bars on; give at least {FEWEST}")
    x, y = scores.double().cpu().numpy(), errors.double().clamp_min(SMALLEST).log().cpu().numpy()
    left = np.empty(len(y))
    for fold in range(FOLDS):
        out = np.arange(len(y)) % FOLDS == fold
        intercept, weights = _fit_monotone(x[~out], y[~out])
        left[out] = y[out] - intercept - x[out] @ weights
    intercept, weights = _fit_monotone(x, y)
    ordered = np.exp(np.sort(left))
    factors = tuple(float(ordered[conformal_rank(level, len(ordered)) - 1]) for level in LEVELS)
    rms = float(np.sqrt(np.mean(np.square(ordered))))
    return Bars(float(intercept), tuple(float(weight) for weight in weights), factors, rms)


def _fit_monotone(x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Intercept and non-negative weights [S] of y [N] on x [N, S] by least squares."""
    from scipy.optimize import nnls

    centre = x.mean(0)
    weights = nnls(x - centre, y - y.mean())[0]
    return float(y.mean() - centre @ weights), weights


def conformal_rank(level: float, n: int) -> int:
    """Which of n ordered errors of held-out views holds the next view's error with at least probability `level`."""
    return math.ceil(level * (n + 1) - 1e-9)


# --------------------------------------------------------------------------------------------------------------- trust


@dataclass(frozen=True)
class Trust:
    """How usual a picture's worst score is. `mean`, `std` [S] are of held-out log scores, `worst` [N] is sorted.

    A score counts by how many deviations it lies above the mean.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    worst: tuple[float, ...]

    def worst_of(self, scores: Tensor) -> Tensor:
        """The largest standardized score [B] of log scores [B, S]."""
        mean, std = (torch.tensor(value, dtype=torch.float64, device=scores.device) for value in (self.mean, self.std))
        return ((scores - mean) / std).amax(1)

    def __call__(self, scores: Tensor) -> Tensor:
        """The share [B] of held-out views, this one counted in, whose worst score is at least as bad."""
        worst = torch.tensor(self.worst, dtype=torch.float64, device=scores.device)
        below = torch.searchsorted(worst, self.worst_of(scores).contiguous())
        return (len(worst) - below + 1).double() / (len(worst) + 1)


def fit_trust(scores: Tensor) -> Trust:
    """Of log scores [N, S] of held-out views."""
    mean, std = scores.mean(0), scores.std(0).clamp_min(SMALLEST)
    trust = Trust(tuple(mean.tolist()), tuple(std.tolist()), ())
    return replace(trust, worst=tuple(trust.worst_of(scores).sort().values.tolist()))


# --------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """What `fit_calibration` found; `residual_scale` [C, h, w], or None for a model that renders no pictures."""

    rotation: Bars
    translation: Bars
    trust: Trust
    residual_scale: Tensor | None

    def scores(
        self, model: Model, interpolant: Interpolant, endpoint: Endpoint, statistics: PoseStatistics,
        estimate: PoseEstimate, latent: Tensor, labels: Tensor,
    ) -> Tensor:  # fmt: skip
        """Log scores [B, S] of estimates of latents [B, C, h, w]; one evaluation of the model, where it renders."""
        residual = None
        if self.residual_scale is not None:
            rendered = rendered_mean(model, interpolant, endpoint, statistics, estimate, latent, labels)
            residual = render_residual(latent, rendered, self.residual_scale)
        return pose_scores(estimate, statistics, residual)

    def filled(self, estimate: PoseEstimate, scores: Tensor) -> PoseEstimate:
        """The estimate with its error bars and its trust, from log scores [B, S]."""
        return replace(
            estimate,
            rotation_std_deg=self.rotation.rms * self.rotation.typical(scores),
            translation_std=self.translation.rms * self.translation.typical(scores),
            rotation_bars_deg=self.rotation.at(scores, BAR_LEVELS),
            translation_bars=self.translation.at(scores, BAR_LEVELS),
            trust=self.trust(scores),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; exact."""
        scale = self.residual_scale
        return {
            "rotation": asdict(self.rotation),
            "translation": asdict(self.translation),
            "trust": asdict(self.trust),
            "residual_scale": None if scale is None else scale.double().tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`; KeyError, TypeError or ValueError if it is none of its results."""
        given = values["residual_scale"]
        scale = None if given is None else torch.tensor(given, dtype=torch.float64)
        if scale is not None and not (scale.ndim == 3 and (scale > 0).all() and scale.isfinite().all()):
            raise ValueError("residual_scale must be positive numbers [C, h, w]")
        scores = len(SCORES) - (scale is None)
        rotation, translation = (_bars(values[name], scores) for name in ("rotation", "translation"))
        mean, std, worst = (_numbers(values["trust"][name]) for name in ("mean", "std", "worst"))
        if not (len(mean) == len(std) == scores and min(std) > 0 and worst and list(worst) == sorted(worst)):
            raise ValueError(f"trust must hold mean and std, above 0, of {scores} scores, and sorted worst ones")
        return cls(rotation, translation, Trust(mean, std, worst), scale)


def _bars(values: dict[str, Any], scores: int) -> Bars:
    weights, factors = _numbers(values["weights"]), _numbers(values["factors"])
    intercept, rms = _numbers([values["intercept"], values["rms"]])
    if not (len(weights) == scores and min(weights) >= 0 and len(factors) == len(LEVELS)):
        raise ValueError(f"bars must have {scores} weights, not negative, and {len(LEVELS)} factors")
    if not (list(factors) == sorted(factors) and min(*factors, rms) >= 0):
        raise ValueError("factors of bars must be sorted and, like rms, not negative")
    return Bars(intercept, weights, factors, rms)


def _numbers(values: list[float]) -> tuple[float, ...]:
    """As they are; ValueError unless all are finite numbers."""
    found = tuple(float(each) for each in values if isinstance(each, int | float))
    if len(found) != len(values) or not all(map(math.isfinite, found)):
        raise ValueError("numbers must be finite")
    return found


def fit_calibration(
    estimate: PoseEstimate, statistics: PoseStatistics, rotation_error_deg: Tensor, translation_error: Tensor,
    residual: Tensor | None,
) -> Calibration:  # fmt: skip
    """From the estimates of N held-out views, their errors [N] and latent - rendered [N, C, h, w], where there is one.

    DataError for fewer than FEWEST views.
    """
    scale = None if residual is None else residual.double().square().mean(0).sqrt().clamp_min(SMALLEST)
    score = None if residual is None else render_residual(residual, torch.zeros_like(residual), scale)  # type: ignore[arg-type]
    scores = pose_scores(estimate, statistics, score)
    rotation, translation = fit_bars(scores, rotation_error_deg), fit_bars(scores, translation_error)
    return Calibration(rotation, translation, fit_trust(scores), scale)
