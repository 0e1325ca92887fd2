"""Packing: entries where the design puts them, and nothing lost on the way back."""

import pytest
import torch

from sitdist.flow import draws
from sitdist.geometry.camera import shell_cameras
from sitdist.geometry.packing import PoseStatistics, destandardize, pack, standardize, unpack

POSES = shell_cameras(draws.uniform(0, "cameras", torch.arange(2000), 3), (3.0, 5.0), "upper")


def test_row_i_fills_channel_i_as_quadrants_in_reading_order() -> None:
    packed = pack(torch.arange(16.0).reshape(1, 4, 4), channels=8, height=4, width=6)
    for row in range(4):
        top = [4.0 * row] * 3 + [4.0 * row + 1] * 3
        bottom = [4.0 * row + 2] * 3 + [4.0 * row + 3] * 3
        expected = torch.tensor([top, top, bottom, bottom])
        assert torch.equal(packed[0, row], expected)
        assert torch.equal(packed[0, row + 4], expected)


def test_unpack_undoes_pack() -> None:
    packed_pose = torch.randn(5, 4, 4)
    torch.testing.assert_close(unpack(pack(packed_pose, 8, 6, 4)), packed_pose)


def test_unpacking_leaves_noise_of_two_over_the_latent_size() -> None:
    noise = draws.normal(0, "noise", torch.arange(2000), 4 * 16 * 16).reshape(-1, 4, 16, 16)
    assert unpack(noise).std().item() == pytest.approx(2 / 16, rel=0.02)


def test_standardized_training_poses_have_mean_zero_and_deviation_one() -> None:
    packed = standardize(POSES, PoseStatistics.from_poses(POSES))
    varying = POSES.std(dim=0, correction=0) > 1e-4
    assert packed.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(packed.std(dim=0, correction=0)[varying], torch.ones(int(varying.sum())).double())


def test_a_constant_entry_does_not_turn_rounding_into_signal() -> None:
    packed = standardize(POSES, PoseStatistics.from_poses(POSES))
    assert packed[:, 2, 0].abs().max() < 1e-12  # the x axis of an upright camera is horizontal
    assert packed[:, 3].abs().max() == 0


def test_pose_comes_back_through_statistics_read_from_json() -> None:
    statistics = PoseStatistics.from_poses(POSES)
    again = PoseStatistics.from_dict(statistics.to_dict())
    assert torch.equal(again.std[:3], statistics.std[:3])
    torch.testing.assert_close(destandardize(standardize(POSES, statistics), again), POSES, rtol=0, atol=1e-12)
