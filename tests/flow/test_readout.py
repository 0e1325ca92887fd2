"""The camera that fits sixteen noisy numbers."""

import pytest
import torch

from sitdist.errors import ConfigError
from sitdist.flow.choices import READOUTS
from sitdist.flow.readout import look_at_fit, read_camera
from sitdist.geometry.camera import look_at, rolled, shell_cameras
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.geometry.pose import check_rigid, rotation_error_deg, translation_error

RANDOM = torch.Generator().manual_seed(0)
POSES = shell_cameras(torch.rand(400, 3, dtype=torch.float64, generator=RANDOM), (3.0, 5.0), (-90.0, 90.0))
STATISTICS = PoseStatistics.from_poses(POSES)
PACKED = standardize(POSES, STATISTICS)
NOISE = torch.randn(400, 4, 4, dtype=torch.float64, generator=RANDOM)


def errors(camera_to_world: torch.Tensor, true: torch.Tensor = POSES) -> tuple[torch.Tensor, torch.Tensor]:
    rotation = rotation_error_deg(camera_to_world[:, :3, :3], true[:, :3, :3])
    return rotation, translation_error(camera_to_world, true)


@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout_is_exact_on_poses_without_noise(readout: str) -> None:
    rotation, translation = errors(read_camera(PACKED, STATISTICS, readout))
    assert rotation.max() < 1e-5
    assert translation.max() < 1e-7


def test_a_camera_that_looks_at_the_origin_is_read_better_by_three_numbers_than_by_twelve() -> None:
    noisy = PACKED + 0.05 * NOISE
    by = {readout: errors(read_camera(noisy, STATISTICS, readout)) for readout in READOUTS}
    assert by["look_at"][0].mean() < 0.8 * by["svd"][0].mean()
    assert by["look_at"][1].mean() < 0.8 * by["svd"][1].mean()
    camera = read_camera(noisy, STATISTICS, "look_at")
    torch.testing.assert_close(camera, look_at(camera[:, :3, 3]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("position", [(0.0, 0.0, 4.0), (1e-7, 0.0, -3.0), (0.0, -2.0, 0.0)])
def test_the_look_at_fit_is_upright_anywhere(position: tuple[float, float, float]) -> None:
    pose = look_at(torch.tensor([position], dtype=torch.float64))
    found = look_at_fit(pose[:, :3], torch.ones(1, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(found, pose, atol=1e-6, rtol=0)


def test_a_fit_to_nonsense_is_still_a_camera() -> None:
    for readout in READOUTS:
        for packed in (10.0 * NOISE, torch.zeros_like(NOISE)):
            for camera in read_camera(packed[:50], STATISTICS, readout):
                check_rigid(camera, readout)


def test_a_rolled_camera_is_read_as_if_it_were_upright() -> None:
    """So the readout is for datasets whose manifest says that all cameras are."""
    turned = rolled(POSES, torch.full((400,), 20.0))
    packed = standardize(turned, STATISTICS)
    assert errors(read_camera(packed, STATISTICS, "look_at"), turned)[0].median() > 10.0
    assert errors(read_camera(packed, STATISTICS), turned)[0].max() < 1e-5


def test_unknown_readouts_are_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"readout 'lookat': unknown; choose one of svd, look_at"):
        read_camera(PACKED, STATISTICS, "lookat")
