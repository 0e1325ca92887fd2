"""Error bars and trust, on errors whose distribution is known."""

import json
import math
from dataclasses import replace

import pytest
import torch

from sitdist.errors import DataError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.error_bars import (
    LEVELS,
    Calibration,
    conformal_rank,
    fit_bars,
    fit_calibration,
    fit_trust,
    pose_scores,
    rendered_mean,
)
from sitdist.flow.estimate import estimate_pose
from sitdist.flow.interpolant import get_interpolant
from sitdist.geometry.camera import shell_cameras
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import rotation_error_deg, translation_error

LINEAR, ENDPOINT = get_interpolant("linear"), Endpoint("pose", 0.1)
RANDOM = torch.Generator().manual_seed(0)
MANY = shell_cameras(torch.rand(800, 3, dtype=torch.float64, generator=RANDOM), (3.0, 5.0))
STATISTICS = PoseStatistics.from_poses(MANY)


def scores_and_errors(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half-normal errors of scale exp(score 0) and two scores that say nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return scores, scores[:, 0].exp() * torch.randn(n, generator=generator, dtype=torch.float64).abs()


def test_bars_hold_as_often_as_they_say_overall_and_where_they_are_largest() -> None:
    bars = fit_bars(*scores_and_errors(500, 1))
    scores, errors = scores_and_errors(20_000, 2)
    for level in LEVELS:
        bar = bars.at(scores, [level])[:, 0]
        largest = bar.argsort(descending=True)[:5000]
        assert (errors <= bar).double().mean().item() == pytest.approx(level, abs=0.05)
        assert (errors[largest] <= bar[largest]).double().mean().item() == pytest.approx(level, abs=0.06)


def test_bars_find_the_scale_of_the_errors() -> None:
    """A half-normal's 90% quantile is 1.645 of its scale and its root mean square is the scale itself."""
    bars = fit_bars(*scores_and_errors(5000, 1))
    scores, _ = scores_and_errors(1000, 2)
    assert bars.weights[0] == pytest.approx(1.0, abs=0.05)
    assert max(bars.weights[1:]) < 0.05
    torch.testing.assert_close(bars.at(scores, [0.9])[:, 0], 1.645 * scores[:, 0].exp(), rtol=0.15, atol=0)
    torch.testing.assert_close(bars.rms * bars.typical(scores), scores[:, 0].exp(), rtol=0.15, atol=0)


def test_bars_never_shrink_where_a_score_grows() -> None:
    scores, errors = scores_and_errors(300, 1)
    assert fit_bars(-scores, errors).weights == (0.0, *fit_bars(-scores, errors).weights[1:])
    assert min(fit_bars(-scores, errors).weights) >= 0.0


def test_the_conformal_rank_is_the_smallest_that_keeps_the_promise() -> None:
    assert [conformal_rank(0.9, n) for n in (9, 10, 19, 99)] == [9, 10, 18, 90]
    assert conformal_rank(0.5, 20) == 11


def test_too_few_views_are_refused() -> None:
    with pytest.raises(DataError, match="19 views: too few"):
        fit_bars(*scores_and_errors(19, 1))


def test_trust_is_the_share_of_held_out_views_that_are_as_odd() -> None:
    generator = torch.Generator().manual_seed(0)
    trust = fit_trust(torch.randn(999, 2, generator=generator, dtype=torch.float64))
    usual = trust(torch.randn(5000, 2, generator=generator, dtype=torch.float64))
    assert usual.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (usual <= 0.1).double().mean().item() == pytest.approx(0.1, abs=0.03)
    odd = torch.tensor([[-3.0, 9.0], [9.0, -3.0], [-9.0, -9.0]], dtype=torch.float64)
    assert trust(odd).tolist() == pytest.approx([0.001, 0.001, 1.0])


def painted(camera_to_world: torch.Tensor, seed: int) -> torch.Tensor:
    """Latents of an object that shows a linear picture of the packed pose, a different one for every seed."""
    generator = torch.Generator().manual_seed(seed)
    brush = torch.randn(16, 256, generator=generator, dtype=torch.float64)
    packed = standardize(camera_to_world, STATISTICS).flatten(1)
    return (packed @ brush / 4.0).reshape(-1, 4, 8, 8)


def model_of(seed: int, noise: float = 0.0):
    """A flow that knows the object exactly: it reads the pose by the brush's inverse, and paints with it."""
    generator = torch.Generator().manual_seed(seed)
    brush = torch.randn(16, 256, generator=generator, dtype=torch.float64) / 4.0
    inverse = torch.linalg.pinv(brush)

    def velocity(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if t[0] == 0.0:
            packed = ENDPOINT.packed_pose(x).flatten(1)
            return (packed @ brush).reshape(x.shape) - x
        packed = (x.flatten(1) @ inverse).reshape(-1, 4, 4)
        return x - ENDPOINT.x0(packed, noise * torch.randn(x.shape, generator=generator, dtype=torch.float64))

    return velocity


def test_a_wrong_object_scores_low_and_the_right_one_as_often_as_any() -> None:
    model = model_of(1, noise=1.0)
    labels = torch.zeros(400, dtype=torch.int64)
    generator = torch.Generator().manual_seed(5)

    def looked_at(poses: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
        latent = painted(poses, seed)
        latent = latent + 0.05 * torch.randn(latent.shape, generator=generator, dtype=torch.float64)
        estimate = estimate_pose(model, LINEAR, latent, labels, STATISTICS, endpoint=ENDPOINT)
        return latent, estimate, rendered_mean(model, LINEAR, ENDPOINT, STATISTICS, estimate, latent, labels)

    latent, estimate, rendered = looked_at(MANY[:400], 1)
    rotation = rotation_error_deg(estimate.camera_to_world[:, :3, :3], MANY[:400, :3, :3])
    translation = translation_error(estimate.camera_to_world, MANY[:400])
    calibration = fit_calibration(estimate, STATISTICS, rotation, translation, latent - rendered)
    for seed, low, high in ((1, 0.4, 0.6), (2, 0.0, 0.01)):
        latent, estimate, rendered = looked_at(MANY[400:], seed)
        scores = calibration.scores(model, LINEAR, ENDPOINT, STATISTICS, estimate, latent, labels)
        filled = calibration.filled(estimate, scores)
        assert low <= filled.trust.mean().item() <= high
        assert filled.rotation_bars_deg.shape == filled.translation_bars.shape == (400, 2)
        if seed == 1:
            errors = rotation_error_deg(estimate.camera_to_world[:, :3, :3], MANY[400:, :3, :3])
            within = (errors <= filled.rotation_bars_deg[:, 1]).double().mean().item()
            assert within == pytest.approx(0.9, abs=0.05)
            assert filled.rotation_std_deg.square().mean().sqrt() == pytest.approx(
                errors.square().mean().sqrt().item(), rel=0.25
            )


def test_a_calibration_survives_json_to_the_last_bit() -> None:
    estimate = estimate_pose(
        model_of(1, 1.0), LINEAR, painted(MANY, 1), torch.zeros(800).long(), STATISTICS, endpoint=ENDPOINT
    )
    errors = torch.rand(800, dtype=torch.float64)
    for residual in (torch.randn(800, 4, 8, 8, dtype=torch.float64), None):
        calibration = fit_calibration(estimate, STATISTICS, errors, errors, residual)
        again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
        assert again.to_dict() == calibration.to_dict()
        assert again.rotation == calibration.rotation
        assert len(again.rotation.weights) == (3 if residual is None else 4)


def test_scores_are_logarithms_and_bounded() -> None:
    estimate = estimate_pose(
        model_of(1, 1.0), LINEAR, painted(MANY, 1), torch.zeros(800).long(), STATISTICS, endpoint=ENDPOINT
    )
    perfect = replace(estimate, so3_residual=torch.zeros(800, dtype=torch.float64))
    scores = pose_scores(perfect, STATISTICS, torch.full((800,), math.e, dtype=torch.float64))
    assert scores.shape == (800, 4)
    assert scores[:, 0].tolist() == pytest.approx([math.log(1e-12)] * 800)
    assert scores[:, 3].tolist() == pytest.approx([1.0] * 800)
