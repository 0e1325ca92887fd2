"""Similarities compose and invert, and the capture's frame is found from its cameras alone."""

import math

import pytest
import torch

from sitdist.errors import PoseError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, look_at, shell_cameras
from sitdist.geometry.pose import project_to_so3, rotation_error_deg
from sitdist.geometry.similarity import Similarity, capture_frame

CAMERA = Intrinsics.from_fov(40.0, 32, 32)


def shell(count=40, radius=(4.0, 4.0), seed=0):
    return shell_cameras(draws.uniform(seed, "cameras", torch.arange(count), 3), radius)


def some_similarity(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotation = project_to_so3(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    return Similarity(2.5, rotation, torch.tensor([10.0, -3.0, 0.5], dtype=torch.float64))


def tilt(degrees):
    """A rotation about the x axis, which is level."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)


def test_a_similarity_its_inverse_and_its_composition_move_points_as_they_should():
    similarity, other = some_similarity(0), some_similarity(1)
    points = torch.randn(20, 3, dtype=torch.float64)
    expected = torch.stack([2.5 * similarity.rotation @ p + similarity.translation for p in points])
    torch.testing.assert_close(similarity.points(points), expected)
    torch.testing.assert_close(similarity.inverse().points(similarity.points(points)), points)
    torch.testing.assert_close(similarity.then(other).points(points), other.points(similarity.points(points)))
    again = Similarity.from_dict(similarity.to_dict())
    assert again.scale == similarity.scale
    assert torch.equal(again.rotation, similarity.rotation)


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.0},
        {"scale": math.inf},
        {"rotation": [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]},
        {"rotation": [[math.nan] * 3] * 3},
        {"translation": [0.0, 0.0]},
        {"translation": [0.0, math.nan, 0.0]},
    ],
)
def test_what_is_no_similarity_is_refused(change):
    with pytest.raises((ValueError, TypeError)):
        Similarity.from_dict(some_similarity().to_dict() | change)


def test_cameras_see_the_mapped_world_as_they_saw_the_world():
    similarity, poses = some_similarity(), shell(5)
    points = torch.randn(7, 3, dtype=torch.float64)
    mapped = similarity.cameras(poses)
    before = (points - poses[:, None, :3, 3]) @ poses[:, :3, :3]  # [5, 7, 3], in the cameras
    after = (similarity.points(points) - mapped[:, None, :3, 3]) @ mapped[:, :3, :3]
    torch.testing.assert_close(after, 2.5 * before)


def test_an_upright_centred_capture_is_only_scaled_to_what_its_pictures_show():
    frame = capture_frame(shell(), [CAMERA] * 40)
    torch.testing.assert_close(frame.rotation, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(frame.translation, torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert frame.scale == pytest.approx(1.0 / (4.0 * math.sin(math.radians(20.0))))


def test_a_tilted_moved_and_scaled_capture_gives_the_same_frame_back():
    poses = shell()
    moved = Similarity(3.0, tilt(50.0), torch.tensor([5.0, 6.0, -7.0], dtype=torch.float64))
    back = moved.then(capture_frame(moved.cameras(poses), [CAMERA] * 40))
    expected = capture_frame(poses, [CAMERA] * 40)
    assert back.scale == pytest.approx(expected.scale)
    torch.testing.assert_close(back.rotation, expected.rotation, atol=1e-9, rtol=0)
    torch.testing.assert_close(back.translation, expected.translation, atol=1e-8, rtol=0)


def test_cameras_on_one_vertical_arc_and_upside_down_captures_are_turned_upright():
    angle = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)
    arc = look_at(torch.stack([4 * angle.cos(), torch.zeros(9), 4 * angle.sin()], -1))
    frame = capture_frame(arc, [CAMERA] * 9)
    assert rotation_error_deg(frame.rotation, torch.eye(3)).item() == pytest.approx(0.0, abs=1e-5)
    flip = Similarity(1.0, tilt(180.0), torch.zeros(3, dtype=torch.float64))
    back = flip.then(capture_frame(flip.cameras(shell()), [CAMERA] * 40))
    torch.testing.assert_close(back.rotation[2], torch.tensor([0.0, 0, 1], dtype=torch.float64), atol=1e-9, rtol=0)


def test_captures_without_one_object_in_their_middle_are_refused():
    poses = shell()
    near = poses.clone()
    near[3, :3, 3] *= 0.2
    with pytest.raises(PoseError, match=r"photo 3: its camera is 0\.8 from .* inside the ball of radius 1\.368"):
        capture_frame(near, [CAMERA] * 40)
    outwards = poses.clone()
    outwards[:, :3, 0], outwards[:, :3, 2] = -outwards[:, :3, 0], -outwards[:, :3, 2]  # turned about their y axes
    with pytest.raises(PoseError, match=r"photo 0: its camera looks away .*40 of 40"):
        capture_frame(outwards, [CAMERA] * 40)
    parallel = poses[:1].repeat(5, 1, 1)
    parallel[:, 0, 3] += torch.arange(5)
    with pytest.raises(PoseError, match="all 5 cameras look in the same direction"):
        capture_frame(parallel, [CAMERA] * 5)
