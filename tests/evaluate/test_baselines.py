"""Baselines against poses and latents whose nearest neighbours are known."""

import math

import pytest
import torch

from sitdist.errors import DataError
from sitdist.evaluate.baselines import TrainingViews, constant_pose, noise_floor
from sitdist.geometry.camera import look_at
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.pose import check_rigid, rotation_error_deg


def ring(degrees, radius=4.0):
    angle = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float64))
    return look_at(torch.stack([radius * angle.cos(), radius * angle.sin(), torch.ones_like(angle)], dim=-1))


def test_constant_pose_of_cameras_left_and_right_of_one_is_that_ones_rotation():
    pose = constant_pose(ring([10.0, 30.0, 50.0]))
    check_rigid(pose, "constant pose")
    assert rotation_error_deg(pose[:3, :3], ring([30.0])[0, :3, :3]).item() == pytest.approx(0.0, abs=1e-6)
    assert pose[:3, 3].norm().item() < ring([30.0])[0, :3, 3].norm().item()


def test_nearest_by_latent_is_the_exact_l2_neighbour_across_chunks(monkeypatch):
    monkeypatch.setattr("sitdist.evaluate.baselines.LATENT_CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(50, 4, 4, 4, generator=generator)
    training = TrainingViews(latents, ring(torch.arange(50.0)), torch.zeros(50, dtype=torch.int64))
    queries = latents[[3, 20, 49]] + 0.1 * torch.randn(3, 4, 4, 4, generator=generator)
    found = training.nearest_by_latent(queries, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(found, ring([3.0, 20.0, 49.0]))


def test_nearest_by_camera_weighs_angle_and_relative_distance():
    cameras = torch.cat([ring([0.0, 20.0]), ring([0.0], radius=8.0)])
    latents = torch.arange(3.0)[:, None, None, None].expand(3, 4, 2, 2)
    training = TrainingViews(latents, cameras, torch.zeros(3, dtype=torch.int64))
    found = training.nearest_by_camera(torch.cat([ring([4.0, 17.0]), ring([3.0], radius=7.5)]), torch.zeros(3).long())
    assert found[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_nearest_views_are_of_the_same_object():
    latents = torch.zeros(2, 4, 2, 2)
    training = TrainingViews(latents, ring([0.0, 90.0]), torch.tensor([0, 1]))
    assert torch.equal(training.nearest_by_latent(latents, torch.tensor([1, 0])), ring([90.0, 0.0]))
    with pytest.raises(DataError, match="label 5 has no training view"):
        training.nearest_by_latent(latents[:1], torch.tensor([5]))


def test_noise_floor_is_that_of_two_sigma_over_l_per_entry():
    cameras = ring(torch.arange(0.0, 360.0, 0.5))
    unit = PoseStatistics(torch.zeros(4, 4, dtype=torch.float64), torch.ones(4, 4, dtype=torch.float64))
    sigma, side = 0.1, 16
    floor = noise_floor(cameras, unit, sigma, (4, side, side), seed=0)
    deviation = 2 * sigma / side
    maxwell = 2 * math.sqrt(2 / math.pi)  # mean length of a 3-vector of unit normal entries
    assert floor.translation == pytest.approx(maxwell * deviation, rel=0.05)
    # Projection keeps the antisymmetric part (a_ij - a_ji) / 2: a rotation vector of deviation / sqrt 2 per axis.
    assert floor.rotation_deg == pytest.approx(math.degrees(maxwell * deviation / math.sqrt(2)), rel=0.05)
    assert noise_floor(cameras, unit, 0.0, (4, side, side), seed=0).rotation_deg == pytest.approx(0.0, abs=1e-6)
