"""Every lens moves points as its published formula says, and a picture through it becomes a pinhole camera's."""

import math

import numpy as np
import pytest
import torch

from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.distortion import Distortion, undistorted

LENSES = {
    "radial": Distortion("perspective", (-0.2,)),
    "opencv": Distortion("perspective", (0.058, -0.07, 0.01), (1e-3, -2e-3)),
    "full opencv": Distortion("perspective", (0.3, -0.1, 0.02, 0.25, -0.05, 0.01), (-1e-3, 5e-4)),
    "fisheye": Distortion("fisheye", (-0.02, 0.01, -0.004, 1e-3)),
    "equidistant": Distortion("fisheye", ()),
    "fov": Distortion("fov", (0.9,)),
}
every_lens = pytest.mark.parametrize("lens", LENSES.values(), ids=LENSES)


def points(side=9, largest=0.5):
    line = torch.linspace(-largest, largest, side, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def published(lens, x, y):
    """One point by the formulas of OpenCV's documentation and of COLMAP's FOV model, term by term."""
    r = math.hypot(x, y)
    if lens.kind == "perspective":
        k = (*lens.radial, 0, 0, 0, 0, 0, 0)
        p1, p2 = lens.tangential
        radial = (1 + k[0] * r**2 + k[1] * r**4 + k[2] * r**6) / (1 + k[3] * r**2 + k[4] * r**4 + k[5] * r**6)
        return (
            x * radial + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
            y * radial + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y,
        )
    if r == 0:
        return 0.0, 0.0
    if lens.kind == "fisheye":
        theta = math.atan(r)
        distorted = theta + sum(k * theta ** (2 * i + 3) for i, k in enumerate(lens.radial))
    else:
        distorted = math.atan(2 * r * math.tan(lens.radial[0] / 2)) / lens.radial[0]
    return x * distorted / r, y * distorted / r


@every_lens
def test_points_move_as_the_published_formula_says(lens):
    expected = [published(lens, x, y) for x, y in points().tolist()]
    torch.testing.assert_close(lens.distort(points()), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@every_lens
def test_undistorted_points_come_back(lens):
    there = lens.distort(points())
    torch.testing.assert_close(lens.undistort(there), points(), atol=1e-8, rtol=0)
    wide = points(largest=3.0)
    wide = wide[lens.reaches(wide)]
    if lens.kind != "perspective":
        assert len(wide) == 81  # these models never turn back
        torch.testing.assert_close(lens.undistort(lens.distort(wide)), wide, atol=1e-8, rtol=0)


def test_points_that_no_ray_before_the_camera_reaches_are_not_a_number():
    equidistant = LENSES["equidistant"]
    at_angle = torch.tensor([[math.radians(89.0), 0.0], [math.radians(95.0), 0.0]], dtype=torch.float64)
    found = equidistant.undistort(at_angle)
    assert found[0, 0].item() == pytest.approx(math.tan(math.radians(89.0)))
    assert found[1].isnan().all()
    barrel = Distortion("perspective", (-0.2,))  # r - 0.2 r^3 is at most 0.861, at r = 1.291
    assert barrel.undistort(torch.tensor([[0.85, 0.0]]))[0, 0] < 1.291
    assert barrel.undistort(torch.tensor([[0.87, 0.0]])).isnan().all()


def test_a_lens_that_folds_the_picture_about_its_middle_is_refused():
    for radial in ((-1e7,), (0.0, 0.0, 0.0, 1e12)):
        with pytest.raises(DataError, match="folds the picture"):
            Distortion("perspective", radial).undistort(points())


def points_of_pixels(camera):
    row, column = torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5
    y, x = torch.meshgrid((row - camera.cy) / camera.fy, (column - camera.cx) / camera.fx, indexing="ij")
    return torch.stack([x, y], dim=-1).double()


def board(x, y):
    """A checkerboard with soft edges, between 0 and 1, in three colours [3, H, W]."""
    wave = torch.sin(12.0 * x) * torch.sin(12.0 * y)
    return torch.stack([0.5 + 0.4 * torch.tanh(gain * wave) for gain in (1.0, 2.0, 3.0)]).float()


@every_lens
def test_a_checkerboard_through_the_lens_becomes_that_of_the_pinhole_camera(lens):
    camera = Intrinsics(300.0, 320.0, 145.0, 118.0, 300, 240)
    place = points_of_pixels(camera)
    pinhole, through = board(*place.unbind(-1)), board(*lens.undistort(place).unbind(-1))
    assert not through.isnan().any()
    picture, inside = undistorted(through, camera, lens)
    seen = inside.bool()
    assert seen.float().mean() > 0.7
    assert seen[100:140, 120:180].all()
    difference = (picture - pinhole).abs()[:, seen]
    assert difference.max() < 0.02  # at the border of the picture
    assert difference.mean() < 5e-4
    assert (through - pinhole).abs()[:, seen].mean() > 2e-3  # the lens does change the picture
    assert (picture[:, ~seen] == 0.0).all()


def test_pixels_from_outside_of_the_picture_or_beyond_the_fold_are_marked():
    camera = Intrinsics(40.0, 40.0, 20.0, 20.0, 40, 40)
    white = torch.ones(1, 40, 40)
    pincushion, inside = undistorted(white, camera, Distortion("perspective", (0.5,)))
    torch.testing.assert_close(pincushion[0], inside)  # nothing but what the picture holds
    assert inside[0, 0] == 0.0  # r = 0.69 is shown at 0.85, and the corner is at 0.71
    assert inside[20, 20] == 1.0
    wide = Intrinsics(10.0, 10.0, 20.0, 20.0, 40, 40)  # its corners, at r = 2.8, would come back to r = -1.6
    _, inside = undistorted(white, wide, Distortion("perspective", (-0.2,)))
    assert inside[0, 0] == 0.0
    assert inside[20, 30] == 1.0
    assert inside[20, 38] == 0.0  # r = 1.85 > 1.29


@pytest.mark.parametrize("name", ["radial", "opencv", "full opencv", "fisheye", "equidistant"])
def test_opencv_agrees(name):
    cv2 = pytest.importorskip("cv2")
    lens = LENSES[name]
    matrix = np.array([[300.0, 0, 145], [0, 320, 118], [0, 0, 1]])
    xyz = np.concatenate([points().numpy(), np.ones((81, 1))], axis=1)
    if lens.kind == "fisheye":
        coefficients = np.array((*lens.radial, *[0.0] * 4)[:4])
        pixels, _ = cv2.fisheye.projectPoints(xyz[:, None], np.zeros(3), np.zeros(3), matrix, coefficients)
    else:
        k = (*lens.radial, *[0.0] * 6)[:6]
        coefficients = np.array([k[0], k[1], *lens.tangential, *k[2:]])
        pixels, _ = cv2.projectPoints(xyz, np.zeros(3), np.zeros(3), matrix, coefficients)
    ours = lens.distort(points()) * torch.tensor([300.0, 320.0]) + torch.tensor([145.0, 118.0])
    np.testing.assert_allclose(ours.numpy(), pixels[:, 0], atol=1e-7, rtol=0)
    through = board(*points_of_pixels(Intrinsics(300.0, 320.0, 145.0, 118.0, 300, 240)).unbind(-1))
    camera = Intrinsics(300.0, 320.0, 145.5, 118.5, 300, 240)  # OpenCV has pixel centres at whole numbers
    picture, inside = undistorted(through, camera, lens)
    image = through.permute(1, 2, 0).numpy()
    if lens.kind == "fisheye":
        theirs = cv2.fisheye.undistortImage(image, matrix, coefficients, Knew=matrix)
    else:
        theirs = cv2.undistort(image, matrix, coefficients)
    inner = torch.nn.functional.avg_pool2d(inside[None], 5, 1, 2)[0] == 1.0
    difference = (picture - torch.from_numpy(theirs).permute(2, 0, 1)).abs()[:, inner]
    assert difference.max() < 5e-3  # OpenCV samples bilinearly, at 32 places in a pixel
    assert difference.mean() < 1e-3
