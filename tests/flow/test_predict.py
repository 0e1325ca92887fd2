"""Every prediction becomes the same velocity, and guidance is what it says."""

import pytest
import torch
from gaussian import GaussianFlow
from torch import nn

from sitdist.errors import ConfigError
from sitdist.flow.interpolant import INTERPOLANTS, get_interpolant
from sitdist.flow.predict import VelocityModel, guided, velocity_model
from sitdist.flow.solve import generate, invert
from sitdist.model.sit import SiT


class Predictor(nn.Module):
    """The exact prediction of a Gaussian flow."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.function(*arguments)


@pytest.mark.parametrize("prediction", ["x0", "score"])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_a_prediction_of_a_gaussian_flow_becomes_its_velocity_and_runs_both_ways(name: str, prediction: str) -> None:
    path = get_interpolant(name, prediction)
    flow, y = GaussianFlow(path), torch.zeros(5, dtype=torch.int64)
    model = velocity_model(Predictor(getattr(flow, prediction)), path, prediction)
    x0 = torch.randn(5, 4, 2, 2, dtype=torch.float64)
    t = torch.linspace(path.t_zero, path.t_one, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x0, t, y), flow(x0, t))
    inner = t.clamp(0.1, 0.9)
    torch.testing.assert_close(path.score_from_velocity(flow(x0, inner), x0, inner), flow.score(x0, inner))
    x1 = generate(model, path, x0, y, "rk4", 60)
    torch.testing.assert_close(x1, flow.mean + flow.deviation * x0, rtol=0, atol=0.02)
    torch.testing.assert_close(invert(model, path, x1, y, "rk4", 60), x0, rtol=0, atol=2e-3)


def test_a_network_of_the_velocity_is_used_as_it_is() -> None:
    network = nn.Identity()
    assert velocity_model(network, get_interpolant("linear"), "velocity") is network


def test_a_wrapped_network_has_its_weights_and_passes_the_labels_to_drop() -> None:
    torch.manual_seed(0)
    network = SiT(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    path = get_interpolant("linear", "x0")
    model = VelocityModel(network, path, "x0")
    assert len(list(model.parameters())) == len(list(network.parameters()))
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.8]), torch.zeros(2, dtype=torch.int64)
    drop = torch.tensor([True, False])
    expected = path.velocity_from_x0(network(x, t, y, drop), x, t)
    torch.testing.assert_close(model(x, t, y, drop), expected)
    assert not torch.equal(model(x, t, y)[0], expected[0])


def by_label(x, t, y, drop):
    """Velocity y + 1 with the label, 0 without."""
    return torch.where(drop, 0, y + 1).to(x.dtype).reshape(-1, 1, 1, 1).expand_as(x)


def test_guidance_goes_beyond_the_labelled_velocity_by_the_scale() -> None:
    x, t, y = torch.zeros(2, 4, 2, 2), torch.zeros(2), torch.tensor([0, 4])
    labelled = torch.tensor([1.0, 5.0]).reshape(-1, 1, 1, 1).expand_as(x)
    for scale in (0.0, 1.0, 4.0):
        torch.testing.assert_close(guided(by_label, scale)(x, t, y), scale * labelled)
    three = guided(by_label, 4.0, "three")(x, t, y)
    torch.testing.assert_close(three[:, :3], 4.0 * labelled[:, :3])
    torch.testing.assert_close(three[:, 3:], labelled[:, 3:])
    with pytest.raises(ConfigError, match="channels 'two': unknown; choose one of all, three"):
        guided(by_label, 4.0, "two")


def test_guidance_needs_a_model_that_was_trained_without_labels_too() -> None:
    network = SiT(4, 2, 4, 16, 1, 2, class_dropout_prob=0.0)
    with pytest.raises(ConfigError, match="class_dropout_prob = 0: trained without dropping labels"):
        guided(network, 2.0)(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_guiding_a_prediction_is_guiding_its_velocity() -> None:
    path = get_interpolant("gvp", "x0")
    x, t, y = torch.randn(2, 4, 2, 2), torch.tensor([0.2, 0.9]), torch.tensor([0, 4])
    model = VelocityModel(Predictor(by_label), path, "x0")
    expected = path.velocity_from_x0(guided(by_label, 3.0)(x, t, y), x, t)
    torch.testing.assert_close(guided(model, 3.0)(x, t, y), expected)
