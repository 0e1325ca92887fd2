"""Undoing a generator's own steps."""

import pytest
import torch
from test_solve import growth

from sitdist.errors import ConfigError
from sitdist.flow.endpoint import pose_endpoint
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.solve import FIXED_STEP, generate, invert, invert_exactly

LINEAR = get_interpolant("linear")


class Network(torch.nn.Module):
    """A smooth random field that mixes all entries, in float32 as trained ones are."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.enter = torch.randn(size + 1, 128, generator=generator) / size**0.5
        self.leave = torch.randn(128, size, generator=generator) * 2.0 / 128**0.5

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.cat([x.flatten(1), t[:, None]], dim=1) @ self.enter + y[:, None])
        return (hidden @ self.leave).reshape(x.shape)


@pytest.mark.parametrize("generator", FIXED_STEP)
def test_inversion_undoes_the_generator_that_was_used(generator: str) -> None:
    network, y = Network(), torch.tensor([0, 1, 0])
    random = torch.Generator().manual_seed(1)
    x0 = pose_endpoint(torch.randn(3, 4, 4, generator=random), torch.randn(3, 4, 4, 4, generator=random), 0.1)
    x1 = generate(network, LINEAR, x0, y, generator, 5)
    found = invert_exactly(network, LINEAR, x1, y, generator, 5)
    assert found.converged.all()
    assert (found.x0 - x0).abs().max() < 1e-4
    assert (invert(network, LINEAR, x1, y, "heun", 5) - x0).abs().max() > 1e-2  # another solver does not


@pytest.mark.parametrize(("generator", "factor"), [("euler", 1.625 * 1.125), ("midpoint", 2.1328125 * 1.2578125)])
def test_the_steps_undone_are_the_generators_and_not_the_equation(generator: str, factor: float) -> None:
    """dx/dt = (1 + t) x in two steps grows by a known factor, which is not that of the equation, e^1.5."""
    ones = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    grown = generate(growth, LINEAR, ones, torch.zeros(2), generator, 2)
    found = invert_exactly(growth, LINEAR, grown, torch.zeros(2, dtype=torch.int64), generator, 2, 1e-12)
    torch.testing.assert_close(found.x0, ones)
    assert abs(float(grown[0, 0, 0, 0]) - 4.4817) > 0.1


def test_a_view_that_does_not_converge_is_flagged_and_leaves_the_others_alone() -> None:
    """The second view's field turns back on itself in every step, so that no x leads to x1."""

    def field(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y.reshape(-1, 1, 1, 1) == 1, 10.0 + x.square(), 0.5 * x)

    x1, y = torch.ones(2, 4, 2, 2), torch.tensor([0, 1])
    found = invert_exactly(field, LINEAR, x1, y, "euler", 4, max_iterations=20)
    assert found.converged.tolist() == [True, False]
    assert found.x0.isfinite().all()
    torch.testing.assert_close(found.x0[:1], invert_exactly(field, LINEAR, x1[:1], y[:1], "euler", 4).x0)
    assert found.function_evaluations[1] == 80
    assert found.function_evaluations[0] < 40


def test_acceleration_solves_a_steep_linear_field_where_plain_iteration_diverges() -> None:
    """Step 1/2 times slope 6 is 3: plain iteration would triple the error every time."""

    def steep(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 6.0 * x

    x0 = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    y = torch.zeros(2, dtype=torch.int64)
    found = invert_exactly(steep, LINEAR, generate(steep, LINEAR, x0, y, "euler", 2), y, "euler", 2, 1e-10)
    assert found.converged.all()
    torch.testing.assert_close(found.x0, x0)


def test_the_tolerance_decides_how_far_the_iteration_goes() -> None:
    network, y = Network(), torch.zeros(2, dtype=torch.int64)
    x1 = torch.ones(2, 4, 4, 4)
    loose, tight = (invert_exactly(network, LINEAR, x1, y, "heun", 5, tolerance) for tolerance in (1e-2, 1e-5))
    assert (loose.function_evaluations < tight.function_evaluations).all()


@pytest.mark.parametrize("generator", ["dopri5", "explicit_adams"])
def test_a_generator_without_steps_of_its_own_cannot_be_undone(generator: str) -> None:
    with pytest.raises(ConfigError, match=f"generator '{generator}': only one with fixed steps of its own.*euler"):
        invert_exactly(growth, LINEAR, torch.ones(2, 4, 2, 2), torch.zeros(2), generator)
