"""Symmetries of objects whose symmetries are known."""

import pytest
import torch

from sitdist.evaluate.baselines import TrainingViews
from sitdist.evaluate.symmetry import find_symmetries, symmetry_aware_errors
from sitdist.flow import draws
from sitdist.geometry.camera import shell_cameras
from sitdist.geometry.pose import rotation_error_deg, translation_error

COUNT = 3000


def views(fold):
    """Cameras about an object that looks the same after 1 / fold of a turn about z: "latents" that tell only that."""
    poses = shell_cameras(draws.uniform(0, "cameras", torch.arange(COUNT), 3), (3.0, 3.2))
    place = poses[:, :3, 3]
    azimuth = torch.atan2(place[:, 1], place[:, 0])
    ring = torch.linalg.vector_norm(place[:, :2], dim=1)
    latents = torch.stack([ring * (fold * azimuth).cos(), ring * (fold * azimuth).sin(), place[:, 2]], 1)
    return TrainingViews(latents.float().reshape(-1, 3, 1, 1), poses, torch.full((COUNT,), 5))


def test_an_object_without_symmetry_has_none():
    found = find_symmetries(views(1), torch.arange(COUNT))
    assert found.examined > 400
    assert found.coinciding < 0.05 * found.examined
    assert found.symmetries == []


@pytest.mark.parametrize("fold", [2, 3])
def test_a_turn_after_which_the_object_looks_the_same_is_found(fold):
    found = find_symmetries(views(fold), 10 * torch.arange(COUNT))
    assert found.coinciding > 0.4 * found.examined
    assert len(found.symmetries) == fold - 1
    for symmetry in found.symmetries:
        assert symmetry.label == 5
        assert symmetry.angle_deg == pytest.approx(360 / fold if fold > 2 else 180, abs=1.0)
        assert symmetry.translation == pytest.approx([0, 0, 0], abs=0.05)
        assert symmetry.rotation[2] == pytest.approx([0, 0, 1], abs=0.02)
    pair = found.pairs[0]
    assert pair.a % 10 == pair.b % 10 == 0
    assert len(found.pairs) == 20


def test_the_error_up_to_a_symmetry_is_against_the_nearest_of_the_poses_that_look_the_same():
    (symmetry,) = find_symmetries(views(2), torch.arange(COUNT)).symmetries
    true = views(2).camera_to_world[:3]
    turned = torch.stack([true[0], symmetry.moved(true[1]), symmetry.moved(true[2])])
    labels = torch.tensor([5, 5, 0])  # the last is another object, which has no symmetry
    rotation, translation = symmetry_aware_errors(turned, true, labels, [symmetry])
    assert rotation[:2].max() < 1e-4
    assert translation[:2].max() < 1e-6
    assert rotation[2] == pytest.approx(float(rotation_error_deg(turned[2, :3, :3], true[2, :3, :3])))
    assert translation[2] == pytest.approx(float(translation_error(turned[2], true[2])))
    assert rotation[2] > 170
