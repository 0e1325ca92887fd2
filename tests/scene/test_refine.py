"""Rendering and comparing finds the camera where the picture says so, and says so where it does not."""

import math

import pytest
import torch

from sitdist.geometry.camera import Intrinsics, look_at, orbit, rolled
from sitdist.geometry.pose import rotation_error_deg, rotation_from_vector, translation_error
from sitdist.scene.field import chair
from sitdist.scene.refine import Stage, moved_camera, refine_cameras
from sitdist.scene.views import look
from sitdist.scene.volume import Rendered

SIZE = 48
CAMERA = Intrinsics.from_fov(40.0, SIZE, SIZE)
GREY = torch.tensor([0.5, 0.5, 0.5])


def see(camera_to_world, intrinsics):
    return look(chair(), camera_to_world, intrinsics, 1)


def pictures(cameras, background=GREY, intrinsics=CAMERA):
    return torch.stack([look(chair(), pose, intrinsics, 4).on(background).permute(2, 0, 1) for pose in cameras])


def disturbed(cameras, degrees, distance, seed=0):
    """Cameras turned about the origin by an angle, and moved by a distance, both in random directions."""
    generator = torch.Generator().manual_seed(seed)
    out = cameras.clone()
    for camera in out:
        axis, way = (torch.randn(3, generator=generator).double() for _ in range(2))
        camera[:3] = rotation_from_vector(math.radians(degrees) * axis / axis.norm()) @ camera[:3]
        camera[:3, 3] += distance * way / way.norm()
    return out


def refine(images, start, background=GREY, enough=0.08, **options):
    count = len(images)
    return refine_cameras(see, images, start, [CAMERA] * count, [background] * count, enough, **options)


def errors(found, true):
    rotation = rotation_error_deg(found.camera_to_world[:, :3, :3], true[:, :3, :3])
    return rotation, translation_error(found.camera_to_world, true)


@pytest.fixture(scope="module")
def free():
    """Cameras with rolls of up to 20 degrees and targets off by up to 0.3."""
    azimuth, elevation = torch.tensor([10.0, 120.0, 250.0]), torch.tensor([15.0, 40.0, 65.0])
    target = torch.tensor([[0.2, 0.1, 0.1], [-0.2, 0.2, 0.0], [0.0, -0.25, 0.15]], dtype=torch.float64)
    place = orbit(azimuth, elevation, torch.tensor([3.2, 3.8, 4.5]))[:, :3, 3]
    return rolled(look_at(place, target), torch.tensor([20.0, -12.0, 5.0]))


def test_a_camera_is_moved_about_the_object_and_about_itself():
    camera = orbit(torch.tensor([30.0]), 20.0, 4.0)[0]
    centre = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    moved = moved_camera(camera, torch.tensor([0.1, 0.2, -0.1, math.log(1.5), 0.0, 0.0]).double(), centre)
    assert (moved[:3, 3] - centre).norm() == pytest.approx(1.5 * float((camera[:3, 3] - centre).norm()))
    before, after = (pose[:3, :3].T @ (centre - pose[:3, 3]) for pose in (camera, moved))
    torch.testing.assert_close(after, 1.5 * before)  # the centre stays at its place in the picture
    turned = moved_camera(camera, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0]).double(), centre)
    torch.testing.assert_close(turned[:3, 3], camera[:3, 3])
    assert float(rotation_error_deg(turned[:3, :3], camera[:3, :3])) == pytest.approx(math.degrees(0.1))


@pytest.mark.distributed  # takes seconds
def test_cameras_that_are_rolled_and_look_past_the_object_are_found(free):
    start = disturbed(free, 8.0, 0.3)
    found = refine(pictures(free), start)
    rotation, translation = errors(found, free)
    assert float(rotation_error_deg(start[:, :3, :3], free[:, :3, :3]).min()) > 7.0
    assert float(rotation.max()) < 0.5
    assert float(translation.max()) < 0.03
    assert (found.error < 0.04).all()
    assert found.settled.all()
    assert (found.rotation_std_deg < 0.3).all()


def test_a_camera_over_the_pole_is_found():
    true = orbit(torch.tensor([40.0, 200.0]), torch.tensor([89.0, 88.0]), 4.0)
    found = refine(pictures(true), disturbed(true, 10.0, 0.1))
    assert float(errors(found, true)[0].max()) < 0.5


def test_a_small_object_seen_from_the_wrong_side_is_not_explained():
    true, opposite = orbit(torch.tensor([0.0]), 20.0, 7.0), orbit(torch.tensor([180.0]), 20.0, 7.0)
    right, wrong = (refine(pictures(true), start, stages=[Stage(48, 4)]) for start in (true, opposite))
    assert float(right.error) < 0.06
    assert float(wrong.error) > 0.1


def test_light_and_occluders_do_not_move_the_camera(free):
    images = 0.8 * pictures(free) ** 1.1
    images[:, :, 20:27, 16:23] = torch.tensor([0.0, 0.9, 0.2])[:, None, None]
    found = refine(images, disturbed(free, 4.0, 0.1), background=(0.8 * GREY**1.1), enough=0.3)
    assert float(errors(found, free)[0].max()) < 1.0


@pytest.mark.distributed  # takes seconds
def test_a_background_that_is_not_plain_is_continued_behind_the_object(free):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    texture = torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0.0, 1.0)[0].permute(1, 2, 0)
    seen = [look(chair(), pose, CAMERA, 4) for pose in free]
    images = torch.stack([(each.light + each.through[..., None] * texture).permute(2, 0, 1) for each in seen])
    found = refine(images, disturbed(free, 3.0, 0.05), background=None)
    assert float(errors(found, free)[0].max()) < 1.5


def test_the_focal_length_is_found_along(free):
    images = pictures(free, intrinsics=Intrinsics.from_fov(36.0, SIZE, SIZE))
    found = refine(images, disturbed(free, 4.0, 0.1), focal=True)
    true = math.tan(math.radians(20.0)) / math.tan(math.radians(18.0))
    assert found.zoom.tolist() == pytest.approx([true] * 3, rel=0.05)
    assert float(errors(found, free)[0].max()) < 1.0


@pytest.mark.distributed  # takes seconds
def test_a_far_start_is_tried_from_elsewhere(free):
    start = torch.stack([moved_camera(free[1], torch.tensor([0.0, 0.45, 0.0, 0.1, 0.0, 0.0]).double())])
    once, again = (refine(pictures(free[1:2]), start, enough=enough) for enough in (1.0, 0.05))
    assert float(errors(again, free[1:2])[0]) < 0.5
    assert float(again.error) <= float(once.error)


def test_what_the_scene_does_not_show_stays_unexplained(free):
    def nothing(camera_to_world, intrinsics):
        height, width = intrinsics.height, intrinsics.width
        return Rendered(torch.zeros(height, width, 3), torch.ones(height, width), torch.zeros(height, width))

    found = refine_cameras(nothing, pictures(free), free, [CAMERA] * 3, [GREY] * 3, 0.08)
    torch.testing.assert_close(found.camera_to_world, free)
    assert (found.error > 0.15).all()


@pytest.mark.distributed  # takes seconds
def test_each_picture_is_refined_by_itself(free):
    images, start = pictures(free), disturbed(free, 2.0, 0.05)
    together, alone = refine(images, start), refine(images[1:2], start[1:2])
    torch.testing.assert_close(alone.camera_to_world, together.camera_to_world[1:2], rtol=0, atol=1e-9)
