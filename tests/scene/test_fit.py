"""A field fitted to a few photos of the built-in chair shows it from other sides, in the unit frame or in its own."""

import math
from dataclasses import replace

import pytest
import torch

from sitdist.errors import ConfigError, DataError, PoseError
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, shell_cameras
from sitdist.geometry.similarity import Similarity
from sitdist.model.codec import psnr
from sitdist.scene.field import chair
from sitdist.scene.fit import FitOptions, Photos, fit_scene, turntable
from sitdist.scene.views import look, render
from sitdist.scene.volume import BACKGROUND

CAMERA = Intrinsics.from_fov(40.0, 32, 32)
OPTIONS = FitOptions(resolutions=(16, 24), steps=(60, 90), rays=1024)
MEASURES = {"psnr": psnr}


def render_views(poses, camera):
    return torch.stack([render(chair(), pose, camera, 2) for pose in poses])


@pytest.fixture(scope="module")
def photos():
    poses = shell_cameras(draws.uniform(0, "cameras", torch.arange(24), 3), (3.8, 4.2))
    return Photos(render_views(poses, CAMERA), poses, [CAMERA] * 24, "chair")


@pytest.fixture(scope="module")
def scene(photos):
    return fit_scene(photos, OPTIONS, MEASURES)


@pytest.mark.distributed
def test_held_out_photos_are_predicted_far_better_than_by_a_constant(photos, scene):
    held_out = photos.pictures(range(0, 24, 10))
    constant = photos.images[1:10].mean((0, 2, 3))[None, :, None, None].expand_as(held_out)
    assert psnr(constant, held_out).mean() < 22.5
    assert scene.held_out["psnr"] > 29.0
    assert scene.held_out["views"] == 3.0
    poses = scene.similarity.cameras(photos.camera_to_world[:1])  # and the finished scene, scaled, is what was measured
    rendered = scene.render(poses, CAMERA)
    assert psnr(rendered, held_out[:1]).item() > 28.0


@pytest.mark.distributed
def test_the_object_fits_the_unit_ball_and_its_empty_space_is_known(scene):
    solid = scene.field.density_scale * torch.nn.functional.softplus(scene.field.values[0]) * scene.field.voxel > 0.3
    z, y, x = solid.nonzero(as_tuple=True)
    edge = (scene.field.box[1] - scene.field.box[0]) / (torch.tensor(scene.field.resolution) - 1)
    points = scene.field.box[0] + torch.stack([x, y, z], -1) * edge
    assert points.norm(dim=-1).quantile(0.99).item() == pytest.approx(0.95, abs=0.1)
    assert scene.field.cells.float().mean() < 0.8
    torch.testing.assert_close(scene.field.background, torch.tensor(BACKGROUND), atol=0.01, rtol=0)


@pytest.mark.distributed
def test_the_same_photos_give_the_same_bits_and_another_seed_does_not(photos):
    short = replace(OPTIONS, resolutions=(8, 12), steps=(60, 20), rays=256)
    first, second = fit_scene(photos, short), fit_scene(photos, short)
    other = fit_scene(photos, replace(short, seed=1))
    assert torch.equal(first.field.values, second.field.values)
    assert first.field.values.shape != other.field.values.shape or not torch.equal(
        first.field.values, other.field.values
    )


@pytest.mark.distributed
def test_photos_moved_by_a_known_similarity_give_the_frame_back(photos, scene):
    c, s = math.cos(0.6), math.sin(0.6)
    tilt = torch.tensor([[1.0, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)
    moved = Similarity(3.0, tilt, torch.tensor([100.0, -20.0, 7.0], dtype=torch.float64))
    poses = moved.cameras(photos.camera_to_world)
    again = fit_scene(replace(photos, camera_to_world=poses), replace(OPTIONS, keep_frame=True), MEASURES)
    back = moved.then(again.similarity)
    assert back.scale == pytest.approx(scene.similarity.scale, rel=0.02)
    torch.testing.assert_close(back.rotation, scene.similarity.rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.translation, scene.similarity.translation, atol=1e-6, rtol=0)
    assert (scene.frame, again.frame) == ("unit", "capture")
    rendered = again.render(poses[:1], CAMERA)  # poses in the user's own frame
    assert psnr(rendered, photos.pictures([0])).item() > 28.0


@pytest.mark.distributed
def test_colour_may_depend_on_the_direction_of_view_and_the_background_may_be_given(photos):
    short = replace(OPTIONS, resolutions=(8,), steps=(80,), rays=256)
    assert fit_scene(photos, short).field.values.shape[0] == 13
    plain = fit_scene(photos, replace(short, view_dependent=False, background=(1.0, 0.0, 0.5)))
    assert plain.field.values.shape[0] == 4
    assert plain.field.background.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.distributed
def test_a_photo_may_be_wider_than_high_off_centre_and_of_bytes(photos):
    camera = Intrinsics(34.0, 30.0, 16.0, 12.0, 40, 20)
    images = (render_views(photos.camera_to_world, camera) * 255).round().byte()
    wide = Photos(images, photos.camera_to_world, [camera] * 24)
    found = fit_scene(wide, OPTIONS, {"psnr": psnr})
    assert found.held_out["psnr"] > 25.0
    assert turntable(found, wide).shape == (3, 2 * 20, 6 * 40)


@pytest.mark.distributed
def test_the_turntable_shows_the_object_in_every_picture(photos, scene):
    sheet = turntable(scene, photos)
    assert sheet.shape == (3, 64, 192)
    tiles = sheet.unfold(1, 32, 32).unfold(2, 32, 32).reshape(3, 12, -1)
    assert (tiles.std(-1).amax(0) > 0.05).all()


def test_photos_that_cannot_be_fitted_are_refused_in_one_line(photos):
    def some(count):
        return Photos(photos.images[:count], photos.camera_to_world[:count], photos.intrinsics[:count])

    with pytest.raises(DataError, match="1 photo: a field needs posed photos"):
        fit_scene(some(1), OPTIONS)
    inside = photos.camera_to_world.clone()
    inside[5, :3, 3] *= 0.1
    with pytest.raises(PoseError, match=r"photo 5: its camera is .* inside the ball"):
        fit_scene(replace(photos, camera_to_world=inside), OPTIONS)
    with pytest.raises(ConfigError, match="one number of steps for each resolution"):
        fit_scene(photos, replace(OPTIONS, steps=(5,)))
    blank = replace(photos, images=torch.full_like(photos.images, 0.5))
    with pytest.raises(DataError, match="nothing that is solid"):
        fit_scene(blank, replace(OPTIONS, resolutions=(8, 8), steps=(5, 5)))


def test_scenery_behind_the_object_is_told(photos, capsys):
    assert capsys.readouterr().out == ""
    images = photos.images.clone()
    images[:, :, :8] = torch.rand(24, 3, 8, 32, generator=torch.Generator().manual_seed(0))
    fit_scene(replace(photos, images=images), replace(OPTIONS, resolutions=(8,), steps=(80,), rays=256))
    assert "of the photos' border is not of the background's colour" in capsys.readouterr().out


@pytest.mark.distributed
def test_with_alpha_a_white_object_is_told_from_white(photos):
    through = [look(chair(), pose, CAMERA, 2).through for pose in photos.camera_to_world]
    opacity = ((1.0 - torch.stack(through)) * 255.0).round().to(torch.uint8)
    white = torch.full_like(photos.images, 255, dtype=torch.uint8)
    scene = fit_scene(replace(photos, images=white, opacity=opacity, backdrop=(1.0, 1.0, 1.0)), OPTIONS)
    seen = scene.look(scene.similarity.cameras(photos.camera_to_world[:1])[0], CAMERA, 2)  # a photo that is held out
    assert (seen.through - through[0]).abs().mean() < 0.4 * (1.0 - through[0]).mean()  # of no object at all: 1
    torch.testing.assert_close(scene.field.background, torch.ones(3))
