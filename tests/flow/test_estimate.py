"""Poses read off latents, on flows whose answer is known."""

import pytest
import torch

from sitdist.errors import ConfigError
from sitdist.flow.choices import LATENT_ESTIMATORS
from sitdist.flow.endpoint import Endpoint, pose_endpoint
from sitdist.flow.estimate import EstimateOptions, estimate_pose, read_pose
from sitdist.flow.interpolant import get_interpolant
from sitdist.geometry.camera import shell_cameras
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import rotation_error_deg, translation_error

LINEAR, Y = get_interpolant("linear"), torch.zeros(2, dtype=torch.int64)
RANDOM = torch.Generator().manual_seed(0)
MANY = shell_cameras(torch.rand(500, 3, dtype=torch.float64, generator=RANDOM), (3.0, 5.0))
POSES, STATISTICS = MANY[:2], PoseStatistics.from_poses(MANY)
LATENT = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=RANDOM)
CLEAN = pose_endpoint(standardize(POSES, STATISTICS), torch.zeros_like(LATENT), 0.0)


def test_every_estimator_reads_the_pose_off_a_perfect_flow() -> None:
    """The exact velocity of straight lines gives the endpoint's pose, with sigma = 0 to rounding."""
    evaluations = {}
    for estimator in LATENT_ESTIMATORS:
        options, endpoint = EstimateOptions(estimator, 4, "euler", 3), Endpoint("pose", 0.0)
        estimate = estimate_pose(lambda x, t, y: LATENT - CLEAN, LINEAR, LATENT, Y, STATISTICS, options, endpoint)
        assert rotation_error_deg(estimate.camera_to_world[:, :3, :3], POSES[:, :3, :3]).max() < 1e-6
        assert translation_error(estimate.camera_to_world, POSES).max() < 1e-9
        assert estimate.spread.max() < 1e-12
        assert estimate.so3_residual.max() < 1e-12
        assert estimate.converged.all()
        evaluations[estimator] = estimate.function_evaluations.tolist()
    counts = {"one_step": 1, "euler": 4, "heun": 8, "midpoint": 8, "euler_249": 249, "exact": 6}
    assert evaluations == {name: [count] * 2 for name, count in counts.items()}


def noisy_model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A perfect flow, but for an error that changes sign with every hundredth of what comes in."""
    return LATENT - CLEAN + 0.3 * torch.sign(torch.sin(100.0 * x))


def test_the_readout_decides_how_the_camera_is_fitted() -> None:
    cameras = [
        estimate_pose(noisy_model, LINEAR, LATENT, Y, STATISTICS, EstimateOptions(readout=readout)).camera_to_world
        for readout in ("svd", "look_at")
    ]
    assert (cameras[0] - cameras[1]).abs().max() > 1e-4


def test_the_residual_is_the_distance_to_the_nearest_rotation() -> None:
    packed = standardize(POSES, STATISTICS)
    grown = POSES.clone()
    grown[1, :3, :3] *= 1.5  # 0.5 times a rotation is left over, whose norm is the root of 3
    x0 = CLEAN.clone()
    x0[1] += pose_endpoint(standardize(grown, STATISTICS) - packed, torch.zeros_like(LATENT), 0.0)[1]
    estimate = read_pose(x0, STATISTICS, Endpoint(), Y)
    torch.testing.assert_close(estimate.so3_residual, torch.tensor([0.0, 0.5 * 3**0.5], dtype=torch.float64))
    torch.testing.assert_close(estimate.camera_to_world, POSES)


def test_the_spread_tells_the_error_that_noise_leaves() -> None:
    noise = torch.randn(400, 4, 8, 8, dtype=torch.float64)
    endpoint = Endpoint("pose", 0.3, 2.0)
    x0 = endpoint.x0(standardize(MANY[:400], STATISTICS), noise)
    estimate = read_pose(x0, STATISTICS, endpoint, torch.zeros(400))
    error = (estimate.packed_pose - standardize(MANY[:400], STATISTICS)).std()
    assert estimate.spread.mean().item() == pytest.approx(error.item(), rel=0.05)
    assert error.item() == pytest.approx(2 * 0.3 / 2.0 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "eular"}, r"estimator 'eular': unknown; choose one of one_step"),
        ({"steps": 0}, "steps 0"),
        ({"tolerance": 0.0}, "tolerance 0"),
        ({"readout": "svg"}, "readout 'svg': unknown; choose one of svd, look_at"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EstimateOptions(**options)
