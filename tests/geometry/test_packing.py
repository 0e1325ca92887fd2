"""Packing: entries where the design puts them, and nothing lost on the way back."""

import pytest
import torch

from sitdist.errors import PoseError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, shell_cameras
from sitdist.geometry.packing import (
    Layout,
    PoseStatistics,
    destandardize,
    pack,
    packed_intrinsics,
    standardize,
    unpack,
    unpack_spread,
)

POSES = shell_cameras(draws.uniform(0, "cameras", torch.arange(2000), 3), (3.0, 5.0))


def test_row_i_fills_channel_i_as_quadrants_in_reading_order() -> None:
    packed = pack(torch.arange(16.0).reshape(1, 4, 4), channels=8, height=4, width=6)
    for row in range(4):
        top = [4.0 * row] * 3 + [4.0 * row + 1] * 3
        bottom = [4.0 * row + 2] * 3 + [4.0 * row + 3] * 3
        expected = torch.tensor([top, top, bottom, bottom])
        assert torch.equal(packed[0, row], expected)
        assert torch.equal(packed[0, row + 4], expected)


def test_interleaved_entries_fill_every_two_by_two_block_in_reading_order() -> None:
    packed = pack(torch.arange(16.0).reshape(1, 4, 4), 8, 4, 6, "interleaved")
    for row in range(4):
        block = 4.0 * row + torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        assert torch.equal(packed[0, row], block.repeat(2, 3))
        assert torch.equal(packed[0, row + 4], block.repeat(2, 3))


@pytest.mark.parametrize("layout", ["quadrants", "interleaved"])
@pytest.mark.parametrize("channels", [4, 8, 12])
def test_unpack_undoes_pack(layout: Layout, channels: int) -> None:
    packed_pose = torch.randn(5, 4, 4)
    torch.testing.assert_close(unpack(pack(packed_pose, channels, 6, 4, layout), layout), packed_pose)


@pytest.mark.parametrize("layout", ["quadrants", "interleaved"])
@pytest.mark.parametrize("k", [1, 2])
def test_unpacking_leaves_noise_of_two_over_the_latent_size_and_the_root_of_k(layout: Layout, k: int) -> None:
    noise = draws.normal(0, "noise", torch.arange(2000), 4 * k * 16 * 16).reshape(-1, 4 * k, 16, 16)
    assert unpack(noise, layout).std().item() == pytest.approx(2 / 16 / k**0.5, rel=0.02)


@pytest.mark.parametrize("layout", ["quadrants", "interleaved"])
def test_the_spread_is_the_standard_error_over_the_places_of_an_entry(layout: Layout) -> None:
    noise = draws.normal(0, "noise", torch.arange(500), 8 * 16 * 16).reshape(-1, 8, 16, 16)
    packed = pack(torch.arange(16.0).reshape(1, 4, 4), 8, 16, 16, layout)
    spread = unpack_spread(packed + noise, layout)
    actual = (unpack(packed + noise, layout) - unpack(packed, layout)).std()
    assert spread.mean().item() == pytest.approx(actual.item(), rel=0.02)
    assert unpack_spread(packed, layout).max() == 0  # nothing of the differences between entries is in it
    assert unpack_spread(noise[:, :4, :2, :2], layout).max() == 0  # one place


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


# -------------------------------------------------------------------------------------------------------- intrinsics


def cameras_of(count: int) -> torch.Tensor:
    """Normalized intrinsics [N, 4] of square, centred cameras whose fields of view differ."""
    fov = torch.linspace(20.0, 60.0, count).tolist()
    return torch.tensor([Intrinsics.from_fov(angle, 64, 64).normalized() for angle in fov], dtype=torch.float64)


def test_the_last_row_carries_standardized_intrinsics_which_come_back() -> None:
    intrinsics = cameras_of(len(POSES))
    statistics = PoseStatistics.from_dict(PoseStatistics.from_poses(POSES, intrinsics).to_dict())
    packed = standardize(POSES, statistics, intrinsics)
    torch.testing.assert_close(packed[:, 3, :2].std(dim=0, correction=0), torch.ones(2).double())
    assert packed[:, 3, :2].mean(dim=0).abs().max() < 1e-12
    assert packed[:, 3, 2:].abs().max() < 1e-12  # the principal point of all is the centre: deviation 1
    torch.testing.assert_close(packed_intrinsics(packed, statistics), intrinsics, rtol=0, atol=1e-12)
    torch.testing.assert_close(destandardize(packed, statistics), POSES, rtol=0, atol=1e-12)
    assert torch.equal(packed[:, :3], standardize(POSES, PoseStatistics.from_poses(POSES))[:, :3])


def test_without_intrinsics_in_the_statistics_there_are_none_in_the_pose() -> None:
    plain = PoseStatistics.from_poses(POSES)
    assert "intrinsics" not in plain.to_dict()
    packed = standardize(POSES, plain, cameras_of(len(POSES)))
    assert packed[:, 3].abs().max() == 0
    assert packed_intrinsics(packed, plain) is None


def test_a_dataset_that_packs_intrinsics_wants_them_with_every_pose() -> None:
    with pytest.raises(PoseError, match="packs intrinsics with every pose, but none are given"):
        standardize(POSES, PoseStatistics.from_poses(POSES, cameras_of(len(POSES))))
