"""Likelihoods of flows and endpoints whose density is known."""

import math

import pytest
import torch
from gaussian import GaussianFlow
from torch.distributions import Normal

from sitdist.flow.interpolant import INTERPOLANTS, get_interpolant
from sitdist.flow.likelihood import log_likelihood, rademacher
from sitdist.flow.solve import invert
from sitdist.geometry.packing import pack

SHAPE = torch.Size((4, 2, 2))
Y, ZEROS = torch.zeros(6, dtype=torch.int64), torch.zeros(6, *SHAPE, dtype=torch.float64)
ONE_PROBE = rademacher(0, torch.arange(6), 1, SHAPE)


def every_direction(batch: int, shape: torch.Size) -> torch.Tensor:
    """Probes with which Hutchinson's estimate is the trace itself."""
    unit = torch.eye(shape.numel(), dtype=torch.float64) * math.sqrt(shape.numel())
    return unit.reshape(-1, 1, *shape).expand(-1, batch, *shape)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_likelihood_of_a_gaussian_flow_is_the_known_one(name: str, method: str) -> None:
    path = get_interpolant(name)
    flow = GaussianFlow(path)
    x1 = 1.5 + 0.5 * torch.randn(6, *SHAPE, dtype=torch.float64)
    found = log_likelihood(flow, path, x1, Y, ZEROS, 1.0, ONE_PROBE, method, 100)
    atol = 0.15 if name == "vp" else 1e-5 if method == "rk4" else 1e-3  # VP is 1% of x0 away from x1 at t_one
    torch.testing.assert_close(found, flow.log_density(x1), rtol=0, atol=atol)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0])
def test_likelihood_given_a_pose_is_that_of_its_latents_whatever_sigma_is(sigma: float) -> None:
    """x0 ~ N(pack(pose), sigma^2 I) is stretched around the pose until latents are N(pack(pose), 0.5^2 I)."""
    path = get_interpolant("linear")
    poses = pack(torch.randn(6, 4, 4, dtype=torch.float64), *SHAPE)
    x1 = poses + 0.5 * torch.randn(6, *SHAPE, dtype=torch.float64)
    rate = math.log(0.5 / sigma)
    found = log_likelihood(lambda x, t, y: rate * (x - poses), path, x1, Y, poses, sigma, ONE_PROBE, "rk4", 100)
    torch.testing.assert_close(found, Normal(poses, 0.5).log_prob(x1).flatten(1).sum(1), rtol=0, atol=1e-3)


def test_hutchinson_probes_average_to_the_trace() -> None:
    path, x1 = get_interpolant("linear"), torch.randn(6, *SHAPE, dtype=torch.float64)
    matrix = 0.2 * torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def coupled(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dx/dt = A x with a full matrix A, so that probes differ and the divergence is its trace."""
        return (x.flatten(1) @ matrix.T).reshape(x.shape)

    def measured(probes: torch.Tensor) -> torch.Tensor:
        return log_likelihood(coupled, path, x1, Y, ZEROS, 1.0, probes, "midpoint", 4)

    exact = measured(every_direction(6, SHAPE))
    few, many = (measured(rademacher(0, torch.arange(6), count, SHAPE)) for count in (1, 256))
    errors = [float((each - exact).square().mean().sqrt()) for each in (few, many)]
    assert errors[0] > 0.1
    assert errors[1] < errors[0] / 4  # by 16 in expectation
    x0 = invert(coupled, path, x1, Y, "midpoint", 4)
    expected = Normal(ZEROS, 1.0).log_prob(x0).flatten(1).sum(1) - matrix.trace()
    torch.testing.assert_close(exact, expected)


def test_probes_are_signs_of_their_position_alone() -> None:
    probes = rademacher(0, torch.arange(8), 3, SHAPE)
    assert probes.shape == (3, 8, *SHAPE)
    assert set(probes.unique().tolist()) == {-1.0, 1.0}
    assert abs(rademacher(0, torch.arange(2000), 1, SHAPE).mean()) < 0.03
    assert torch.equal(probes[:, 5:6], rademacher(0, torch.tensor([5]), 3, SHAPE))
    assert not torch.equal(probes[0], probes[1])
