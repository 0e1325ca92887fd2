"""SDEs: every form and solver gives the marginals of the ODE, and only where there is a score."""

import math

import pytest
import torch
from gaussian import GaussianFlow

from sitdist.errors import ConfigError
from sitdist.flow.interpolant import INTERPOLANTS, get_interpolant
from sitdist.flow.sample import DIFFUSIONS, LAST_STEPS, STOCHASTIC, SampleOptions, diffusion, generate_sde, sde_interval

Y = torch.zeros(500, dtype=torch.int64)


def sde(generator, steps, diffusion, norm, last_step, size):
    return SampleOptions(
        generator, steps, diffusion=diffusion, diffusion_norm=norm, last_step=last_step, last_step_size=size
    )


def sampled(path, options, flow=None, seed=0):
    """x1 of 8,000 independent numbers of a Gaussian flow."""
    generator = torch.Generator().manual_seed(seed)

    def noise(step: int = 0) -> torch.Tensor:
        return torch.randn(500, 4, 2, 2, dtype=torch.float64, generator=generator)

    return generate_sde(flow or GaussianFlow(path), path, noise(), Y, noise, options, "gaussian")


@pytest.mark.parametrize("method", STOCHASTIC)
@pytest.mark.parametrize("form", DIFFUSIONS)
def test_marginals_are_those_of_the_ode(form: str, method: str) -> None:
    steps = 200 if form == "SBDM" else 60  # its diffusion is nearly infinite where it begins
    for name in INTERPOLANTS:
        path = get_interpolant(name)
        flow = GaussianFlow(path)
        x1 = sampled(path, sde(method, steps, form, 0.5, "Mean", 0.01), flow)
        # x0 to x1 by the ODE: mean + deviation * x0, up to the solver's error of O(1 / steps)
        assert x1.mean() == pytest.approx(flow.mean, abs=0.05), name
        assert x1.std() == pytest.approx(flow.deviation, abs=0.05), name


@pytest.mark.parametrize(("method", "coarse"), [("euler_maruyama", 8), ("stochastic_heun", 2)])
def test_the_bias_falls_with_the_number_of_steps(method: str, coarse: int) -> None:
    path = get_interpolant("linear")
    bias = [abs(sampled(path, sde(method, steps, "sigma", 2.0, "Euler", 0.001)).var() - 0.25) for steps in (coarse, 64)]
    assert bias[1] < 0.5 * bias[0]


def test_last_steps_are_what_they_are_called() -> None:
    path, size = get_interpolant("linear"), 0.04
    flow = GaussianFlow(path)
    t = torch.full((500,), 1 - size, dtype=torch.float64)
    before = sampled(path, SampleOptions("euler_maruyama", 20, diffusion="sigma", last_step=None), flow)
    assert before.shape == (500, 4, 2, 2)
    results = {last: sampled(path, sde("euler_maruyama", 20, "sigma", 1.0, last, size), flow) for last in LAST_STEPS}
    # All three start from the same x at 1 - size, found from Euler's: x + size v(x) is affine in x.
    slope, offset = (flow(torch.full((1, 1, 1, 1), v, dtype=torch.float64), t[:1]).item() for v in (1.0, 0.0))
    x = (results["Euler"] - size * offset) / (1 + size * (slope - offset))
    torch.testing.assert_close(results["Euler"], x + size * flow(x, t))
    torch.testing.assert_close(results["Mean"], x + size * (flow(x, t) + size * flow.score(x, t)))  # w = sigma = size
    mean, variance = 1 - size, size**2  # of x given x1: (1 - size) x1 + size x0
    torch.testing.assert_close(results["Tweedie"], (x + variance * flow.score(x, t)) / mean)


def test_diffusions_have_the_published_values() -> None:
    t = torch.tensor([0.25], dtype=torch.float64)
    linear = {form: diffusion(get_interpolant("linear"), form, t, 0.5).item() for form in DIFFUSIONS}
    assert linear == pytest.approx(
        {
            "constant": 0.5,
            "SBDM": 0.5 * (0.75**2 / 0.25 + 0.75),
            "sigma": 0.5 * 0.75,
            "linear": 0.5 * 0.75,
            "decreasing": 0.25 * (0.5 * math.cos(math.pi / 4) + 1) ** 2,
            "increasing-decreasing": 0.5 * 0.5,
        }
    )
    assert diffusion(get_interpolant("gvp"), "sigma", t).item() == pytest.approx(math.cos(math.pi / 8))
    # SBDM on the VP path is half the rate of its noise: 0.5 (0.1 + 0.75 * 19.9)
    assert diffusion(get_interpolant("vp"), "SBDM", t).item() == pytest.approx(0.5 * (0.1 + 0.75 * 19.9))


def test_the_published_misspelling_is_understood() -> None:
    t = torch.rand(5)
    path = get_interpolant("linear")
    assert SampleOptions(diffusion="inccreasing-decreasing").diffusion == "inccreasing-decreasing"
    assert torch.equal(diffusion(path, "inccreasing-decreasing", t), diffusion(path, "increasing-decreasing", t))


@pytest.mark.parametrize("prediction", ["velocity", "x0", "score"])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_drift_and_diffusion_are_finite_at_all_times_of_the_solvers(name: str, prediction: str) -> None:
    path = get_interpolant(name, prediction)
    for form in DIFFUSIONS:
        for last in (None, "Mean"):
            options = SampleOptions(diffusion=form, last_step=last)
            ends = torch.tensor(sde_interval(path, options))
            x, velocity = torch.randn(2, 2, 4, 2, 2)
            assert diffusion(path, form, ends).isfinite().all()
            assert path.score_from_velocity(velocity, x, ends).isfinite().all()
            assert ends[1] == pytest.approx(0.96 if last else 0.999)
    assert sde_interval(get_interpolant("linear"), SampleOptions(diffusion="sigma"))[0] == 0
    assert sde_interval(get_interpolant("linear"), SampleOptions(diffusion="SBDM"))[0] == 1e-3
    assert sde_interval(get_interpolant("vp"), SampleOptions(diffusion="SBDM"))[0] == 0


def test_the_pose_endpoint_has_no_sde_and_the_error_says_why() -> None:
    path = get_interpolant("linear")
    with pytest.raises(ConfigError, match=r"SDE sampling needs the gaussian endpoint, not 'pose': score = .*N\(0, I\)"):
        generate_sde(GaussianFlow(path), path, torch.zeros(1, 4, 2, 2), Y[:1], torch.zeros, SampleOptions(), "pose")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "milstein"}, "generator 'milstein': unknown; choose one of euler, .*, euler_maruyama"),
        ({"diffusion": "sbdm"}, "SDE diffusion 'sbdm': unknown; choose one of constant, SBDM"),
        ({"last_step": "none"}, "SDE last step 'none': unknown; choose one of Mean, Tweedie, Euler"),
        ({"last_step_size": 0.0}, "SDE last_step_size 0.0: expected a number from"),
        ({"diffusion_norm": -1.0}, "SDE norm -1.0: expected a number from"),
        ({"steps": 0}, "generator steps 0: expected a whole number from 1"),
    ],
)
def test_a_wrong_option_is_named_with_the_choices(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleOptions(**options)
