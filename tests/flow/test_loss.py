"""The loss of every prediction and weight, and the times at which it is finite."""

import itertools

import pytest
import torch

from sitdist.errors import ConfigError
from sitdist.flow.interpolant import INTERPOLANTS, PREDICTIONS, get_interpolant
from sitdist.flow.loss import LOSS_WEIGHTS, flow_loss, loss_weight, training_interval, weigh_times
from sitdist.flow.predict import VelocityModel
from sitdist.flow.sample import diffusion

LINEAR, Y = get_interpolant("linear"), torch.zeros(2, dtype=torch.int64)
T = torch.tensor([0.2, 0.7], dtype=torch.float64)


def squares(difference):
    return difference.square().flatten(1).mean(dim=1)


def test_loss_is_zero_for_the_true_velocity_and_the_mean_square_otherwise() -> None:
    x0, x1 = torch.randn(2, 2, 4, 4, 4)
    t = torch.tensor([0.2, 1.0])
    assert flow_loss(lambda x, t, y, d: x1 - x0, LINEAR, x0, x1, t, Y).abs().max() == 0
    torch.testing.assert_close(flow_loss(lambda x, t, y, d: x1 - x0 + 3, LINEAR, x0, x1, t, Y), torch.full((2,), 9.0))


def test_only_the_samples_at_one_are_weighed() -> None:
    loss, t = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([0.0, 1.0, 1 - 1e-6])
    assert weigh_times(loss, t, 10.0).tolist() == [2.0, 30.0, 5.0]


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize("prediction", ["x0", "score"])
def test_velocity_weight_makes_the_loss_the_squared_error_of_the_velocity(name: str, prediction: str) -> None:
    path = get_interpolant(name, prediction)
    x0, x1, output = torch.randn(3, 2, 4, 4, 4)

    class Network(torch.nn.Module):
        def forward(self, *_):
            return output

    sample = path.sample(x0, x1, T)
    error = squares(VelocityModel(Network(), path, prediction)(sample.x_t, T, Y) - sample.velocity)
    loss = flow_loss(Network(), path, x0, x1, T, Y, None, prediction, "velocity")
    torch.testing.assert_close(loss, error.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_likelihood_weight_is_the_sbdm_diffusion_times_the_squared_error_of_the_score(name: str) -> None:
    path = get_interpolant(name, "score")
    x0, x1, output = torch.randn(3, 2, 4, 4, 4)
    true = -x0 / path.coefficients(T)[1].reshape(-1, 1, 1, 1)
    expected = diffusion(path, "SBDM", T) * squares(output - true)
    loss = flow_loss(lambda *_: output, path, x0, x1, T, Y, None, "score", "likelihood")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=0)


def test_without_a_weight_x0_and_score_have_the_same_loss_where_they_say_the_same() -> None:
    x0, x1, guess = torch.randn(3, 2, 4, 4, 4)
    sigma = (1 - T).float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        flow_loss(lambda *_: guess, LINEAR, x0, x1, T, Y, None, "x0"),
        flow_loss(lambda *_: -guess / sigma, LINEAR, x0, x1, T, Y, None, "score"),
    )


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_every_combination_is_finite_at_the_ends_of_its_times_and_none_gives_time_away(name: str) -> None:
    x0, x1, output = torch.randn(3, 2, 4, 4, 4)
    for prediction, weight in itertools.product(PREDICTIONS, LOSS_WEIGHTS):
        if prediction == "velocity" and weight != "none":
            continue
        path = get_interpolant(name, prediction)
        ends = training_interval(path, prediction, weight)
        arguments = (path, x0, x1, torch.tensor(ends), Y, None, prediction, weight)
        assert flow_loss(lambda *_: output, *arguments).isfinite().all(), (prediction, weight)
        for end, nearest in zip(ends, (0.0, 1.0), strict=True):
            if end != nearest:  # there, the loss or the velocity is infinite, or the loss does not see the output
                t = torch.full((2,), nearest)
                losses = [
                    flow_loss(lambda *_, k=k: k * output, path, x0, x1, t, Y, None, prediction, weight) for k in (1, 2)
                ]
                finite = all((each.abs() < 1e6).all() for each in [*losses, *path.coefficients(t)])
                assert not finite or torch.allclose(losses[0], losses[1], atol=1e-5), (prediction, weight)


def test_unknown_weight_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'snr'.*none, velocity, likelihood"):
        loss_weight(LINEAR, "snr", T)
