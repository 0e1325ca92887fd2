"""Likelihoods of flows and endpoints whose density is known."""

import math

import pytest
import torch
from gaussian import GaussianFlow

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import pose_endpoint
from sitdist.flow.interpolant import INTERPOLANTS, get_interpolant
from sitdist.flow.likelihood import GaussianBase, PoseBase, log_likelihood, rademacher
from sitdist.geometry.packing import pack

SHAPE = torch.Size((4, 2, 2))
Y = torch.zeros(6, dtype=torch.int64)


def every_direction(batch: int, shape: torch.Size) -> torch.Tensor:
    """Probes with which Hutchinson's estimate is the trace itself."""
    unit = torch.eye(shape.numel(), dtype=torch.float64) * math.sqrt(shape.numel())
    return unit.reshape(-1, 1, *shape).expand(-1, batch, *shape)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_likelihood_of_a_gaussian_flow_is_the_known_one(name: str) -> None:
    path = get_interpolant(name)
    flow = GaussianFlow(path)
    x1 = 1.5 + 0.5 * torch.randn(6, *SHAPE, dtype=torch.float64)
    result = log_likelihood(flow, path, x1, Y, GaussianBase(), rademacher(0, torch.arange(6), 1, SHAPE), "rk4", 100)
    atol = 1e-5 if name != "vp" else 0.15  # at t_one the VP path is 1% of x0 away from x1
    torch.testing.assert_close(result.log_density, flow.log_density(x1), rtol=0, atol=atol)
    torch.testing.assert_close(result.x0, (x1 - 1.5) / 0.5, rtol=0, atol=max(atol, 1e-5))


def coupled(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx/dt = A x with a full matrix A, so that probes differ and the divergence is its trace."""
    generator = torch.Generator().manual_seed(1)
    matrix = 0.2 * torch.randn(16, 16, dtype=torch.float64, generator=generator)
    return (x.flatten(1).double() @ matrix.T).reshape(x.shape).to(x.dtype)


def test_hutchinson_probes_average_to_the_trace() -> None:
    path, x1 = get_interpolant("linear"), torch.randn(6, *SHAPE, dtype=torch.float64)

    def measured(probes: torch.Tensor) -> torch.Tensor:
        return log_likelihood(coupled, path, x1, Y, GaussianBase(), probes, "midpoint", 4).log_density

    exact = measured(every_direction(6, SHAPE))
    few, many = (measured(rademacher(0, torch.arange(6), count, SHAPE)) for count in (1, 256))
    errors = [float((each - exact).square().mean().sqrt()) for each in (few, many)]
    assert errors[0] > 0.1
    assert errors[1] < errors[0] / 4  # by 16 in expectation
    generator = torch.Generator().manual_seed(1)
    trace = 0.2 * torch.randn(16, 16, dtype=torch.float64, generator=generator).trace()
    expected = GaussianBase().log_density(
        log_likelihood(coupled, path, x1, Y, GaussianBase(), every_direction(6, SHAPE), "midpoint", 4).x0
    )
    torch.testing.assert_close(exact, expected - trace)


def test_adaptive_solvers_measure_the_same() -> None:
    path = get_interpolant("linear")
    flow = GaussianFlow(path)
    x1 = torch.randn(6, *SHAPE, dtype=torch.float64)
    result = log_likelihood(flow, path, x1, Y, GaussianBase(), rademacher(0, torch.arange(6), 1, SHAPE), "dopri5")
    torch.testing.assert_close(result.log_density, flow.log_density(x1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(4, 2, 2), (8, 4, 6)])
def test_density_of_the_pose_endpoint_is_the_mixture_over_the_training_poses(shape) -> None:
    poses, sigma = torch.randn(7, 4, 4, dtype=torch.float64), 0.3
    x0 = pack(poses[:3], *shape) + 0.3 * torch.randn(3, *shape, dtype=torch.float64)
    parts = [
        torch.distributions.Normal(pack(pose[None], *shape), sigma).log_prob(x0).flatten(1).sum(dim=1) for pose in poses
    ]
    expected = torch.stack(parts).logsumexp(dim=0) - math.log(7)
    torch.testing.assert_close(
        PoseBase(pose_endpoint(poses, torch.zeros(7, *shape, dtype=torch.float64), 0.0), sigma).log_density(x0),
        expected,
    )


def test_likelihood_over_the_pose_endpoint_is_the_density_carried_along() -> None:
    """x1 = e^1.5 x0 on dx/dt = (1 + t) x, so the density is that of x0 less 1.5 for every number."""
    path, poses = get_interpolant("linear"), torch.randn(5, 4, 4, dtype=torch.float64)
    x0 = pack(poses[:3], *SHAPE) + 0.1 * torch.randn(3, *SHAPE, dtype=torch.float64)
    base = PoseBase(pack(poses, *SHAPE), 0.1)
    probes = rademacher(0, torch.arange(3), 1, SHAPE)
    result = log_likelihood(
        lambda x, t, y: (1 + t).reshape(-1, 1, 1, 1) * x, path, math.exp(1.5) * x0, Y[:3], base, probes, "rk4", 40
    )
    torch.testing.assert_close(result.log_density, base.log_density(x0) - 1.5 * 16, rtol=0, atol=1e-3)


def test_without_noise_on_the_poses_there_is_no_likelihood() -> None:
    with pytest.raises(ConfigError, match=r"flow.sigma = 0: .*x0 has no density.*train with flow.sigma above 0"):
        PoseBase(torch.zeros(3, *SHAPE), 0.0)


def test_probes_are_signs_of_their_position_alone() -> None:
    probes = rademacher(0, torch.arange(8), 3, SHAPE)
    assert probes.shape == (3, 8, *SHAPE)
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    assert abs(rademacher(0, torch.arange(2000), 1, SHAPE).mean()) < 0.03
    assert torch.equal(probes[:, 5:6], rademacher(0, torch.tensor([5]), 3, SHAPE))
    assert not torch.equal(probes[0], probes[1])
