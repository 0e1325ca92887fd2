"""Cameras stand and look where they should."""

import math

import pytest
import torch

from sitdist.flow import draws
from sitdist.geometry.camera import (
    Intrinsics,
    camera_radius,
    camera_rays,
    full_turn,
    is_upright,
    look_at,
    orbit,
    rolled,
    shell_cameras,
)
from sitdist.geometry.pose import check_rigid


def test_look_at_from_the_x_axis_is_the_known_pose() -> None:
    expected = torch.tensor([[0.0, 0, 1, 4], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(look_at(torch.tensor([4.0, 0, 0])), expected)


def test_the_central_ray_meets_the_target_and_up_stays_up() -> None:
    position = torch.randn(50, 3, dtype=torch.float64) * 3
    target = (0.3, -0.2, 0.1)
    pose = look_at(position, target)
    _, directions = camera_rays(pose, Intrinsics.from_fov(40, 1, 1))
    to_target = torch.tensor(target, dtype=torch.float64) - position
    torch.testing.assert_close(directions[:, 0, 0], to_target / to_target.norm(dim=1, keepdim=True))
    assert (pose[:, 2, 0].abs() < 1e-12).all()  # x axis horizontal
    assert (pose[:, 2, 1] > 0).all()  # y axis upwards


def test_look_at_is_a_rotation_at_both_poles() -> None:
    for z in (4.0, -4.0):
        pose = look_at(torch.tensor([0.0, 0.0, z]))
        check_rigid(pose, "pole")
        assert pose[2, 2] == math.copysign(1, z)


def test_pixels_map_to_rays_with_the_first_row_on_top() -> None:
    intrinsics = Intrinsics(fx=2.0, fy=2.0, cx=2.0, cy=2.0, width=4, height=4)
    origins, directions = camera_rays(torch.eye(4, dtype=torch.float64), intrinsics)
    x, y, z = directions[0, 3]  # top right pixel, centre (3.5, 0.5)
    assert x / -z == pytest.approx(0.75)
    assert y / -z == pytest.approx(0.75)
    assert z < 0
    assert origins.abs().max() == 0


def test_shell_is_uniform_in_area_and_radius() -> None:
    poses = shell_cameras(draws.uniform(0, "cameras", torch.arange(20_000), 3), (3.0, 5.0))
    radius, height = camera_radius(poses), poses[:, 2, 3] / camera_radius(poses)
    for value, low, high in ((radius, 3.0, 5.0), (height, 0.0, 1.0)):
        assert value.min() >= low
        assert value.max() <= high
        assert value.mean() == pytest.approx((low + high) / 2, abs=0.02)
        assert value.var() == pytest.approx((high - low) ** 2 / 12, rel=0.03)
    full = shell_cameras(draws.uniform(0, "cameras", torch.arange(20_000), 3), (3.0, 5.0), (-90.0, 90.0))
    assert (full[:, 2, 3] < 0).double().mean() == pytest.approx(0.5, abs=0.02)


def test_an_orbit_goes_round_its_target() -> None:
    """By hand: azimuth from +x towards +y, elevation above the horizon, the camera looks down its -z."""
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    cameras = orbit(full_turn(4), 30.0, 2.0, target=target)
    root = 3.0**0.5
    places = torch.tensor([[root, 0, 1], [0, root, 1], [-root, 0, 1], [0, -root, 1]], dtype=torch.float64)
    torch.testing.assert_close(cameras[:, :3, 3], places + target)
    torch.testing.assert_close(cameras[:, :3, 2], 0.5 * places)
    torch.testing.assert_close(cameras[1, :3, 0], torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64))
    assert is_upright(cameras).all()


def test_an_orbit_with_roll_is_the_upright_one_turned_about_its_line_of_sight() -> None:
    azimuth, elevation = torch.tensor([10.0, 200.0]), torch.tensor([-20.0, 70.0])
    radius, roll = torch.tensor([2.0, 3.0]), torch.tensor([90.0, -30.0])
    upright, turned = orbit(azimuth, elevation, radius), orbit(azimuth, elevation, radius, roll)
    torch.testing.assert_close(turned, rolled(upright, roll))
    torch.testing.assert_close(turned[0, :3, 0], upright[0, :3, 1])
    torch.testing.assert_close(orbit(azimuth[1], 70.0, 3.0, -30.0), turned[1])
