"""Rigid poses: what is one, the nearest one, and how far two of them are apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sitdist.errors import PoseError

RIGID_TOLERANCE = 1e-3
FARTHEST = 1e12  # a camera's coordinate: beyond, squares leave little of float32


def check_rigid(camera_to_world: Tensor, name: str) -> None:
    """PoseError, naming `name`, unless the [4, 4] matrix is a rotation (determinant +1) and a translation, finite."""
    if camera_to_world.shape != (4, 4):
        raise PoseError(f"{name}: pose of shape {list(camera_to_world.shape)}; expected a 4x4 camera-to-world matrix")
    pose = camera_to_world.to(torch.float64)
    if not torch.isfinite(pose).all():
        raise PoseError(f"{name}: pose holds NaN or infinity; remove the view or repair its pose")
    if not torch.allclose(pose[3], pose.new_tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-6):
        raise PoseError(f"{name}: last row of the pose is {pose[3].tolist()}; expected [0, 0, 0, 1] (row-major 4x4)")
    rotation = pose[:3, :3]
    residual = (rotation.T @ rotation - torch.eye(3, dtype=torch.float64)).abs().max().item()
    determinant = torch.linalg.det(rotation).item()
    if residual > RIGID_TOLERANCE or determinant < 0:
        raise PoseError(
            f"{name}: pose is not rigid (determinant {determinant:.4g}, |R^T R - I| {residual:.2g} > "
            f"{RIGID_TOLERANCE:g}); divide out scale and shear, and mirror no axis"
        )
    if pose[:3, 3].abs().max() > FARTHEST:
        raise PoseError(f"{name}: position {pose[:3, 3].tolist()}; expected at most {FARTHEST:g}, so change the unit")


def are_rigid(camera_to_world: Tensor) -> Tensor:
    """Whether `check_rigid` accepts each of the matrices [..., 4, 4]; [...] bool."""
    pose = camera_to_world.to(torch.float64)
    rotation, last = pose[..., :3, :3], pose.new_tensor([0.0, 0.0, 0.0, 1.0])
    residual = (rotation.mT @ rotation - torch.eye(3).to(pose)).abs().amax((-2, -1))
    first, second, third = rotation.unbind(-2)
    determinant = (torch.linalg.cross(first, second) * third).sum(-1)
    proper = (residual <= RIGID_TOLERANCE) & (determinant >= 0)
    return proper & torch.isclose(pose[..., 3, :], last, atol=1e-6).all(-1) & pose.isfinite().all(-1).all(-1)


def project_to_so3(matrix: Tensor) -> Tensor:
    """The rotation nearest to `matrix` [..., 3, 3] in Frobenius norm, determinant +1, float64.

    Source: orthogonal Procrustes by SVD, with the sign of the smallest singular direction chosen (Umeyama 1991).
    """
    u, _, vh = torch.linalg.svd(matrix.to(torch.float64))
    sign = torch.ones(matrix.shape[:-1], dtype=torch.float64, device=matrix.device)
    sign[..., 2] = torch.linalg.det(u @ vh).sign()
    return (u * sign[..., None, :]) @ vh


def rotation_error_deg(rotation_a: Tensor, rotation_b: Tensor) -> Tensor:
    """Angle in degrees between rotations [..., 3, 3], float64.

    2 asin(|A - B|_F / (2 sqrt 2)): exact near 0, where arccos of the trace is rounding noise.
    """
    difference = rotation_a.to(torch.float64) - rotation_b.to(torch.float64)
    chord = torch.linalg.matrix_norm(difference) / (2.0 * math.sqrt(2.0))
    return torch.rad2deg(2.0 * torch.asin(chord.clamp(max=1.0)))


def translation_error(camera_to_world_a: Tensor, camera_to_world_b: Tensor) -> Tensor:
    """Distance between the camera positions of poses [..., 4, 4], in the dataset's units, float64."""
    difference = camera_to_world_a[..., :3, 3].to(torch.float64) - camera_to_world_b[..., :3, 3].to(torch.float64)
    return torch.linalg.vector_norm(difference, dim=-1)


def rotation_from_vector(vector: Tensor) -> Tensor:
    """Rotations [..., 3, 3] about the axes `vector` [..., 3] by their lengths in radians (Rodrigues' formula)."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.linalg.matrix_exp(torch.stack(rows, dim=-2))
