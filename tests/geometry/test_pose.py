"""Angles, distances and the nearest rotation, by known answers."""

import math

import pytest
import torch

from sitdist.errors import PoseError
from sitdist.geometry.pose import check_rigid, project_to_so3, rotation_error_deg, translation_error


def about_z(degrees: float) -> torch.Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("degrees", [1e-6, 0.01, 30.0, 179.99, 180.0])
def test_rotation_error_is_the_angle_between(degrees: float) -> None:
    assert rotation_error_deg(about_z(20), about_z(20 + degrees)).item() == pytest.approx(degrees, rel=1e-6)


def test_translation_error_ignores_the_rotation() -> None:
    a, b = torch.eye(4), torch.eye(4)
    b[:3, 3] = torch.tensor([3.0, 0.0, 4.0])
    b[:3, :3] = about_z(90)
    assert translation_error(a, b) == 5.0


def test_projection_undoes_scaling_and_never_gives_a_reflection() -> None:
    torch.testing.assert_close(project_to_so3(1.7 * about_z(33)), about_z(33))
    mirrored = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    assert torch.linalg.det(project_to_so3(mirrored)) == pytest.approx(1.0)
    noisy = torch.randn(20, 3, 3, dtype=torch.float64)
    nearest = project_to_so3(noisy)
    other = project_to_so3(torch.randn(20, 3, 3))
    assert ((noisy - nearest).norm(dim=(1, 2)) <= (noisy - other).norm(dim=(1, 2)) + 1e-12).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pose: pose[:3, :3].mul_(1.1), "view 3: pose is not rigid"),
        (lambda pose: pose[0, :3].neg_(), "determinant -1"),
        (lambda pose: pose[1, 3].fill_(math.nan), "NaN"),
        (lambda pose: pose[3, 0].fill_(2.0), "last row"),
    ],
)
def test_what_is_not_rigid_is_refused_by_name(change, message: str) -> None:
    pose = torch.eye(4, dtype=torch.float64)
    check_rigid(pose, "view 3")
    change(pose)
    with pytest.raises(PoseError, match=message):
        check_rigid(pose, "view 3")
