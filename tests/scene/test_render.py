"""Volume rendering against closed forms, and the built-in chair seen from all sides."""

import math

import pytest
import torch

from sitdist.geometry.camera import Intrinsics, camera_rays, look_at
from sitdist.scene.field import Solids, chair
from sitdist.scene.views import render
from sitdist.scene.volume import BACKGROUND, composite, render_solids

GREY = torch.tensor(BACKGROUND)


def solid(colour, centre=(0.0, 0.0, 0.0), half=(0.5, 0.5, 0.5), density=3.0, ball=False):
    """One solid of a single colour at height 0, where it is lit by 0.85."""
    values = [torch.tensor([value], dtype=torch.float64) for value in (centre, half, colour, colour, (0.0, 0.0, 0.0))]
    return Solids(*values, torch.tensor([ball]), density)


def ray(origin, direction):
    direction = torch.tensor([direction], dtype=torch.float64)
    return torch.tensor([origin], dtype=torch.float64), direction / direction.norm()


def inside_and_colour(solids, points):
    """Density [P] and colour [P, 3] of solids at points [P, 3]."""
    offset = (points[:, None] - solids.centre) / solids.half
    inside = torch.where(solids.round, offset.square().sum(-1) <= 1.0, offset.abs().amax(-1) <= 1.0)  # [P, K]
    colour = solids.texture(points[:, None].expand_as(offset))
    return solids.density * inside.any(1), colour[torch.arange(len(points)), inside.to(points.dtype).argmax(1)]


def march(solids, origins, directions, near, far, samples):
    """Rays [R, 3] by `samples` equal stretches, each as at its middle: what the closed form is measured against."""
    step = (far - near) / samples
    distance = near + step * (torch.arange(samples, dtype=origins.dtype) + 0.5)
    points = origins[:, None] + distance[:, None] * directions[:, None]  # [R, S, 3]
    density, colour = inside_and_colour(solids, points.reshape(-1, 3))
    colour = colour.reshape(len(origins), samples, 3)
    return composite(density.reshape(len(origins), samples) * step, colour, distance.expand(len(origins), samples))


def render_views(poses, camera, supersample=2):
    return torch.stack([render(chair(), pose, camera, supersample) for pose in poses])


# -------------------------------------------------------------------------------------------------------- composite


def test_stretches_that_let_everything_through_show_the_background():
    background = torch.tensor([0.1, 0.2, 0.3])
    rendered = composite(torch.zeros(2, 5), torch.rand(2, 5, 3), torch.ones(2, 5))
    torch.testing.assert_close(rendered.on(background), background.expand(2, 3))
    assert rendered.through.tolist() == [1.0, 1.0]


def test_the_first_opaque_stretch_hides_all_behind_it():
    optical_depth = torch.tensor([[0.0, 1e4, 3.0, 1e4]])
    colours = torch.rand(1, 4, 3)
    seen = composite(optical_depth, colours, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    torch.testing.assert_close(seen.on(GREY), colours[:, 1])
    assert seen.depth.item() == pytest.approx(2.0)


def test_two_half_transparent_stretches_weigh_a_half_and_a_quarter():
    optical_depth = torch.full((1, 2), math.log(2.0))
    colours = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    expected = torch.tensor([[0.5, 0.25, 0.25]])
    seen = composite(optical_depth, colours, torch.tensor([[4.0, 8.0]]))
    torch.testing.assert_close(seen.on(torch.tensor([0.0, 0.0, 1.0])), expected)
    assert seen.depth.item() == pytest.approx(0.5 * 4.0 + 0.25 * 8.0)


# ----------------------------------------------------------------------------------------------------------- solids


@pytest.mark.parametrize(
    ("ball", "origin", "direction", "inside"),
    [
        (False, (0.0, -3.0, 0.0), (0.0, 1.0, 0.0), 1.0),  # through the middle of a box
        (False, (0.0, 0.0, 0.0), (0.0, 1.0, 0.0), 0.5),  # from within
        (False, (0.0, -3.0, 0.6), (0.0, 1.0, 0.0), 0.0),  # above it
        (False, (0.0, 3.0, 0.0), (0.0, 1.0, 0.0), 0.0),  # behind the camera
        (False, (-0.5, -1.0, 0.0), (1.0, 1.0, 0.0), math.sqrt(0.5)),  # across a corner
        (True, (0.0, -3.0, 0.0), (0.0, 1.0, 0.0), 1.0),
        (True, (0.3, -3.0, 0.0), (0.0, 1.0, 0.0), 0.8),
        (True, (0.0, -3.0, 0.6), (0.0, 1.0, 0.0), 0.0),
        (True, (0.0, 3.0, 0.0), (0.0, 1.0, 0.0), 0.0),
    ],
)
def test_a_solid_absorbs_by_the_length_of_the_ray_inside_it(ball, origin, direction, inside):
    black = solid((0.0, 0.0, 0.0), density=3.0, ball=ball)
    colour = render_solids(black, *ray(origin, direction)).on(GREY.double())
    expected = 0.5 * math.exp(-3.0 * inside)
    torch.testing.assert_close(colour, torch.full((1, 3), expected, dtype=torch.float64))


def test_an_opaque_solid_shows_its_colour_and_hides_what_is_behind_it():
    near, far = solid((1.0, 0.0, 0.2), (0.0, -1.0, 0.0)), solid((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))
    fields = ("centre", "half", "colour", "second_colour", "frequency", "round")
    both = Solids(*(torch.cat([getattr(far, name), getattr(near, name)]) for name in fields), density=1e4)
    colour = render_solids(both, *ray((0.0, -3.0, 0.0), (0.0, 1.0, 0.0))).light
    torch.testing.assert_close(colour, 0.85 * torch.tensor([[1.0, 0.0, 0.2]], dtype=torch.float64))
    colour = render_solids(both, *ray((0.0, 3.0, 0.0), (0.0, -1.0, 0.0))).light
    torch.testing.assert_close(colour, 0.85 * torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))


def test_marching_comes_to_the_closed_form_of_a_solid():
    grid = torch.linspace(-0.7, 0.7, 8, dtype=torch.float64)
    origins = torch.stack([*torch.meshgrid(grid, grid, indexing="ij"), torch.full((8, 8), 3.0)], -1).reshape(-1, 3)
    directions = torch.tensor([[0.1, -0.2, -1.0]], dtype=torch.float64).expand(64, 3)
    directions = directions / directions.norm(dim=1, keepdim=True)
    for ball in (False, True):
        black = solid((0.0, 0.0, 0.0), density=3.0, ball=ball)
        exact = render_solids(black, origins, directions).through
        errors = [
            (march(black, origins, directions, 1.5, 5.0, samples).through - exact).abs().max() for samples in (70, 7000)
        ]
        assert errors[1] < 1e-3  # half a step more or less inside, of 5e-4 each
        assert errors[0] > 10 * errors[1]


# -------------------------------------------------------------------------------------------------------- the chair

SIDES = {"front": (0.0, 3.0, 0.6), "rear": (0.0, -3.0, 0.6), "right": (3.0, 0.0, 0.6), "left": (-3.0, 0.0, 0.6)}
CAMERA = Intrinsics.from_fov(36.0, 24, 24)


def test_marching_through_the_chair_gives_the_picture_that_its_solids_give_in_closed_form():
    camera = Intrinsics.from_fov(36.0, 10, 10)
    for position in ((2.5, 2.0, 1.0), (-1.5, -2.5, 0.5)):
        rays = [part.reshape(-1, 3) for part in camera_rays(look_at(torch.tensor(position)), camera)]
        solids = chair(torch.float64)
        exact, marched = (
            rendered.on(GREY.double())
            for rendered in (render_solids(solids, *rays), march(solids, *rays, 1.5, 4.7, 1000))
        )
        difference = (exact - marched).abs()  # the closed form takes the colour at the entry, the march along the way
        assert difference.mean() < 2e-3
        assert difference.max() < 0.1
        assert (exact - GREY.double()).abs().amax(1).gt(0.1).double().mean() > 0.2  # and the chair is in the picture


def test_the_solids_of_the_chair_are_disjoint_and_fit_the_ball_of_radius_1():
    solids = chair(torch.float64)
    low, high = solids.centre - solids.half, solids.centre + solids.half
    overlap = (torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)).amin(-1)
    overlap.fill_diagonal_(0.0)
    assert overlap.max() < 1e-9
    assert torch.maximum(low.abs(), high.abs()).norm(dim=1).max() < 1.0


def test_a_camera_that_looks_away_sees_only_the_background():
    position = torch.tensor([2.0, 1.0, 1.5])
    away = render_views(look_at(position, (4.0, 2.0, 3.0))[None], CAMERA)
    assert (away == torch.tensor(BACKGROUND).mul(255).round().div(255)[0]).all()
    assert render_views(look_at(position)[None], CAMERA).std() > 0.05


def test_the_four_sides_of_the_chair_differ():
    pictures = render_views(torch.stack([look_at(torch.tensor(side)) for side in SIDES.values()]), CAMERA)
    for first in range(4):
        for second in range(first):
            for picture in (pictures[second], pictures[second].flip(-1)):  # mirrored too: no side is another's mirror
                assert (pictures[first] - picture).abs().amax(0).gt(0.15).float().mean() > 0.1


def test_the_armrest_is_on_the_chairs_own_right_in_the_picture():
    """From the front the world's +x, where the purple armrest is, is on the picture's left."""
    picture = render_views(look_at(torch.tensor(SIDES["front"]))[None], CAMERA)[0]
    red, green, blue = picture
    purple = (red > green + 0.15) & (blue > green + 0.15)
    assert purple[:, :12].sum() > 5
    assert purple[:, 12:].sum() == 0


def test_supersampling_is_the_mean_over_finer_pixels():
    pose = look_at(torch.tensor([[2.0, 2.0, 1.0]]))
    fine = render_views(pose, Intrinsics.from_fov(36.0, 48, 48), supersample=1)
    expected = torch.nn.functional.avg_pool2d(fine, 2)
    assert (render_views(pose, CAMERA, supersample=2) - expected).abs().max() <= 1.01 / 255  # both are rounded
    assert (render_views(pose, CAMERA, supersample=1) - expected).abs().max() > 10 / 255


def test_pictures_are_in_steps_of_1_255_so_that_png_keeps_them():
    picture = render_views(look_at(torch.tensor([[2.0, 2.0, 1.0]])), CAMERA)
    stored = (picture * 255.0).round().to(torch.uint8)
    assert torch.equal(stored.float() / 255.0, picture)
    assert stored.float().std() > 10
