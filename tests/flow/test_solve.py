"""Generating and inverting on fields whose answer is known."""

import math

import pytest
import torch

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import sample_times
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.solve import ADAPTIVE, SOLVERS, generate, invert, invert_at_arrival

LINEAR, Y = get_interpolant("linear"), torch.zeros(2, dtype=torch.int64)


def growth(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dx/dt = (1 + t) x, so x(1) = e^1.5 x(0)."""
    return (1 + t).reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)])
def test_error_falls_with_the_order_of_the_method(method: str, order: int) -> None:
    x0 = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    error = [float((generate(growth, LINEAR, x0, Y, method, n) - math.exp(1.5)).abs().max()) for n in (10, 20)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("method", "order"), [("explicit_adams", 4), ("implicit_adams", 5)])
def test_error_of_multi_step_methods_falls_with_their_order(method: str, order: int) -> None:
    x0 = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    error = [float((generate(growth, LINEAR, x0, Y, method, n, 1e-9) - math.exp(1.5)).abs().max()) for n in (40, 80)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.2)


ADAPTIVE_ORDERS = {
    "dopri5": (5, (1e-5, 1e-8)),
    "dopri8": (8, (1e-4, 1e-8)),
    "bosh3": (3, (1e-3, 1e-5)),
    "fehlberg2": (2, (1e-3, 1e-4)),
    "adaptive_heun": (2, (1e-2, 1e-3)),
    "scipy_solver": (1, (1e-5, 1e-8)),  # LSODA, of a varying order
}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_error_of_an_adaptive_method_falls_with_evaluations_as_its_order_says(method: str) -> None:
    order, tolerances = ADAPTIVE_ORDERS[method]
    evaluations, errors = [], []
    for tolerance in tolerances:
        times = []

        def counted(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, times: list = times) -> torch.Tensor:
            times.append(float(t[0]))
            return growth(x, t, y)

        x0 = torch.ones(2, 4, 2, 2, dtype=torch.float64)
        x1 = generate(counted, LINEAR, x0, Y, method, 3, tolerance)
        errors.append(float((x1 - math.exp(1.5)).abs().max()))
        evaluations.append(len(times))
        torch.testing.assert_close(invert(counted, LINEAR, x1, Y, method, 3, tolerance), x0, rtol=0, atol=3 * errors[0])
        if method != "scipy_solver":
            assert (min(times), max(times)) == (0, 1)  # never beyond the ends
    slope = math.log(errors[0] / errors[1]) / math.log(evaluations[1] / evaluations[0])
    assert slope > 0.8 * order


@pytest.mark.parametrize("method", SOLVERS)
def test_inversion_undoes_generation(method: str) -> None:
    x0 = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    steps = 400 if method == "euler" else 50
    back = invert(growth, LINEAR, generate(growth, LINEAR, x0, Y, method, steps, 1e-4), Y, method, steps, 1e-4)
    torch.testing.assert_close(back, x0, rtol=0, atol=0.02 if method == "euler" else 5e-3)


def test_the_tolerance_of_an_adaptive_method_is_met_over_the_batch() -> None:
    x0 = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    alone = generate(growth, LINEAR, x0, Y, "dopri5", 1, 1e-3)
    x0[1] *= 100
    together = generate(growth, LINEAR, x0, Y, "dopri5", 1, 1e-3)
    assert not torch.equal(alone[0], together[0])
    alone = generate(growth, LINEAR, x0[:1], Y[:1], "heun")
    assert torch.equal(alone[0], generate(growth, LINEAR, x0, Y, "heun")[0])


def test_inversion_at_arrival_takes_the_velocity_at_the_time_it_goes_to() -> None:
    """On dx/dt = 2 t the explicit sum over arrival times is 1 - 1/n; over departure times it would be 1 + 1/n."""
    x1 = torch.full((2, 4, 2, 2), 5.0, dtype=torch.float64)
    x0 = invert_at_arrival(lambda x, t, y: 2 * t.reshape(-1, 1, 1, 1).expand_as(x), LINEAR, x1, Y, 10)
    torch.testing.assert_close(x0, x1 - (1 - 1 / 10))


def test_unknown_solver_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'eular'.*euler, midpoint, heun"):
        generate(growth, LINEAR, torch.ones(2, 4, 2, 2), Y, "eular", 2)


def test_times_have_the_asked_shares_at_the_ends_and_are_uniform_between() -> None:
    u = torch.rand(40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = sample_times(u, share_at_one=0.25, share_at_zero=0.15)
    assert (t == 1).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (t == 0).float().mean() == pytest.approx(0.15, abs=0.01)
    inner = t[(t > 0) & (t < 1)]
    assert inner.mean() == pytest.approx(0.5, abs=0.01)
    assert inner.var() == pytest.approx(1 / 12, abs=0.003)
