"""Levenberg-Marquardt on problems whose minimum is known."""

import torch

from sitdist.geometry.least_squares import levenberg_marquardt


def rosenbrock(scale: torch.Tensor):
    """Residuals and derivatives of Rosenbrock's valley, whose minimum is at (1, 1), for several scales at once."""

    def residual(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([scale[rows] * (x[:, 1] - x[:, 0] ** 2), 1.0 - x[:, 0]], dim=-1)

    def jacobian(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        one, zero = torch.ones_like(x[:, 0]), torch.zeros_like(x[:, 0])
        first = torch.stack([-2.0 * scale[rows] * x[:, 0], scale[rows]], dim=-1)
        return torch.stack([first, torch.stack([-one, zero], dim=-1)], dim=1)

    return residual, jacobian


def test_it_reaches_the_minimum_of_rosenbrocks_valley() -> None:
    start = torch.tensor([[-1.2, 1.0], [3.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    found, settled = levenberg_marquardt(start, *rosenbrock(torch.tensor([10.0, 3.0, 10.0]).double()), 200)
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-8, rtol=0)
    assert settled.all()


def test_no_step_grows_the_cost_or_exceeds_the_largest() -> None:
    start = torch.tensor([[-1.2, 1.0], [3.0, -2.0]], dtype=torch.float64)
    residual, jacobian = rosenbrock(torch.tensor([10.0, 3.0]).double())
    rows, costs, place = torch.arange(2), [], start
    for steps in range(1, 12):
        place, settled = levenberg_marquardt(start, residual, jacobian, steps, largest_step=0.3)
        costs.append(residual(place, rows).square().sum(1))
        assert ((place - start).abs() <= 0.3 * steps + 1e-12).all()
    assert (torch.stack(costs).diff(dim=0) <= 0).all()
    assert not settled.any()


def test_problems_are_solved_one_by_one() -> None:
    start = torch.tensor([[-1.2, 1.0], [3.0, -2.0]], dtype=torch.float64)
    scale = torch.tensor([10.0, 3.0], dtype=torch.float64)
    both, _ = levenberg_marquardt(start, *rosenbrock(scale), 7)
    alone = [levenberg_marquardt(start[i : i + 1], *rosenbrock(scale[i : i + 1]), 7)[0] for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))
