"""What t = 0 holds: the packed pose and noise, or noise alone."""

import pytest
import torch

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import Endpoint, pose_endpoint
from sitdist.flow.estimate import EstimateOptions, estimate_pose
from sitdist.flow.interpolant import get_interpolant
from sitdist.geometry.camera import shell_cameras
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import rotation_error_deg

RANDOM = torch.Generator().manual_seed(0)
POSES = shell_cameras(torch.rand(300, 3, dtype=torch.float64, generator=RANDOM), (3.0, 5.0))
STATISTICS = PoseStatistics.from_poses(POSES)
NOISE = torch.randn(4, 8, 6, 6, dtype=torch.float64, generator=RANDOM)


def test_the_pose_endpoint_is_gain_times_the_pose_and_sigma_times_the_noise() -> None:
    packed = standardize(POSES[:4], STATISTICS)
    plain = pose_endpoint(packed, NOISE, 0.0)
    torch.testing.assert_close(Endpoint("pose", 0.5, 3.0).x0(packed, NOISE), 3.0 * plain + 0.5 * NOISE)
    assert not torch.equal(Endpoint("pose", 0.0, 1.0, "interleaved").x0(packed, NOISE), plain)


@pytest.mark.parametrize("endpoint", [Endpoint("pose", 0.0, 10.0), Endpoint("pose", 0.0, 0.1, "interleaved")])
def test_the_pose_is_read_with_the_gain_and_the_layout_that_it_was_packed_with(endpoint: Endpoint) -> None:
    x0, y = endpoint.x0(standardize(POSES[:4], STATISTICS), NOISE), torch.zeros(4).long()
    for estimator in ("one_step", "euler"):
        estimate = estimate_pose(
            lambda x, t, y: NOISE - x0,
            get_interpolant("linear"),
            NOISE,
            y,
            STATISTICS,
            EstimateOptions(estimator, 2),
            endpoint,
        )
        assert rotation_error_deg(estimate.camera_to_world[:, :3, :3], POSES[:4, :3, :3]).max() < 1e-6
        torch.testing.assert_close(estimate.camera_to_world, POSES[:4])


def test_the_gaussian_endpoint_is_the_noise_whatever_the_pose_is() -> None:
    endpoint = Endpoint("gaussian", 1.0)
    assert torch.equal(endpoint.x0(standardize(POSES[:4], STATISTICS), NOISE), NOISE)
    with pytest.raises(ConfigError, match=r"flow.endpoint = 'gaussian': x0 is noise and holds no pose"):
        endpoint.packed_pose(NOISE)


def test_only_the_gaussian_endpoint_gives_the_pose_to_the_model_twice_where_a_batch_is_guided() -> None:
    seen = []

    def model(x, t, y, drop_labels=None, pose=None):
        seen.append(pose)
        return x

    packed = standardize(POSES[:2], STATISTICS)
    Endpoint("pose").conditioned(model, packed)(NOISE[:2], None, None)
    Endpoint("gaussian").conditioned(model, packed)(NOISE[:2], None, None)
    Endpoint("gaussian").conditioned(model, packed)(NOISE, None, None)
    assert seen[0] is None
    assert torch.equal(seen[1], packed)
    assert torch.equal(seen[2], torch.cat([packed, packed]))
