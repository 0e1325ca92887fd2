"""Rendering and comparing finds the camera where the picture says so, and changes nothing where it does not."""

import pytest
import torch

from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.scene.field import chair
from sitdist.scene.refine import Stage, camera_of, orbit_of, refine_look_at
from sitdist.scene.views import render as render_scene

INTRINSICS = Intrinsics.from_fov(36.0, 24, 24)


def render(camera_to_world, rows=None, shrink=1):
    camera = INTRINSICS.shrunk(shrink)
    return torch.stack([render_scene(chair(), pose, camera, min(shrink, 2)) for pose in camera_to_world])


@pytest.fixture(scope="module")
def orbits():
    radius, azimuth, elevation = torch.tensor([[3.2, 4.0, 4.8], [0.3, 2.0, -1.2], [0.3, 0.6, 0.9]], dtype=torch.float64)
    return torch.stack([radius.log(), azimuth, elevation], dim=1)


def test_an_orbit_is_a_camera_and_back(orbits):
    torch.testing.assert_close(orbit_of(camera_of(orbits)), orbits)


def test_refinement_finds_the_cameras_of_pictures_of_the_scene(orbits):
    true = camera_of(orbits)
    start = camera_of(orbits + torch.tensor([0.03, 0.04, -0.03], dtype=torch.float64))
    refined = refine_look_at(render, render(true), start, enough=0.02)
    before = rotation_error_deg(start[:, :3, :3], true[:, :3, :3])
    after = rotation_error_deg(refined.camera_to_world[:, :3, :3], true[:, :3, :3])
    assert float(before.min()) > 2.0
    assert float(after.max()) < 0.5
    assert float(translation_error(refined.camera_to_world, true).max()) < 0.02
    assert bool((refined.residual < 0.2 * refined.residual_before).all())


def test_each_picture_is_refined_by_itself(orbits):
    true, start = camera_of(orbits), camera_of(orbits + 0.02)
    together = refine_look_at(render, render(true), start, enough=0.02).camera_to_world
    alone = refine_look_at(render, render(true[1:2]), start[1:2], enough=0.02).camera_to_world
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=1e-6)


def test_a_picture_that_no_step_brings_nearer_keeps_its_orbit(orbits):
    start = camera_of(orbits)
    grey = torch.full((3, 3, 24, 24), 0.5)

    def black(cameras, rows, shrink):
        return torch.zeros(len(cameras), 3, 24 // shrink, 24 // shrink)

    unmoved = refine_look_at(black, grey, start, [Stage(24, 2, 0.01)])
    torch.testing.assert_close(unmoved.camera_to_world, start)
    torch.testing.assert_close(unmoved.residual, torch.full((3,), 0.5, dtype=torch.float64))
    assert not unmoved.settled.any()


@pytest.mark.distributed
def test_what_is_not_near_enough_is_tried_from_elsewhere(orbits):
    true, start = camera_of(orbits), camera_of(orbits + torch.tensor([0.0, -0.35, 0.1], dtype=torch.float64))
    once = refine_look_at(render, render(true), start, enough=1.0)
    again = refine_look_at(render, render(true), start, enough=0.02)
    errors = [rotation_error_deg(each.camera_to_world[:, :3, :3], true[:, :3, :3]) for each in (once, again)]
    assert float(errors[0].min()) > 5.0
    assert float(errors[1].max()) < 0.5


def test_views_that_are_done_are_not_rendered_again(orbits):
    rendered = []

    def counted(cameras, rows, shrink):
        rendered.append(rows.tolist())
        return render(cameras, rows, shrink)

    true = camera_of(orbits)
    start = camera_of(orbits + torch.tensor([[0.0] * 3, [0.05] * 3, [0.05] * 3], dtype=torch.float64))
    refine_look_at(counted, render(true), start, [Stage(24, 12, 0.005)], enough=1.0)
    of_first, of_second = (sum(view in rows for rows in rendered) for view in (0, 1))
    assert of_first < of_second
