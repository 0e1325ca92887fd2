"""Paths: the published values, and the identities between endpoint, velocity and posterior mean."""

from pathlib import Path as FilePath

import pytest
import torch
from safetensors.torch import load_file

from sitdist.errors import ConfigError
from sitdist.flow.interpolant import INTERPOLANTS, PREDICTIONS, get_interpolant

REFERENCE = load_file(FilePath(__file__).parents[1] / "reference" / "sit_tiny.safetensors")
PUBLISHED_NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_points_and_conversions_equal_the_published_code(name: str) -> None:
    path, t = get_interpolant(name), REFERENCE["in.t_mid"]
    sample = path.sample(REFERENCE["in.x0"], REFERENCE["in.x1"], t)
    score = path.score_from_velocity(sample.velocity, sample.x_t, t)
    ours = {
        "x_t": sample.x_t,
        "u_t": sample.velocity,
        "noise_from_velocity": path.posterior_x0(sample.velocity, sample.x_t, t),
        "score_from_velocity": score,
        "velocity_from_score": path.velocity_from_score(score, sample.x_t, t),
    }
    prefix = f"path.{PUBLISHED_NAMES[name]}."
    assert {key.removeprefix(prefix) for key in REFERENCE if key.startswith(prefix)} == ours.keys()
    for key, value in ours.items():
        expected = REFERENCE[prefix + key]
        assert (value - expected).norm() / expected.norm() < 1e-5, key


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_conversions_give_the_endpoints_back_and_undo_each_other(name: str) -> None:
    path = get_interpolant(name)
    x0, x1 = torch.randn(2, 7, 4, 8, 8, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    sample = path.sample(x0, x1, t)
    torch.testing.assert_close(path.posterior_x0(sample.velocity, sample.x_t, t), x0)
    torch.testing.assert_close(path.posterior_x1(sample.velocity, sample.x_t, t), x1)
    torch.testing.assert_close(path.velocity_from_x0(x0, sample.x_t, t), sample.velocity)
    score = path.score_from_velocity(sample.velocity, sample.x_t, t)
    torch.testing.assert_close(score, -x0 / path.coefficients(t)[1].reshape(-1, 1, 1, 1))
    torch.testing.assert_close(path.velocity_from_score(score, sample.x_t, t), sample.velocity)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_samplers_stay_where_the_velocity_that_follows_from_the_prediction_is_finite(name, prediction) -> None:
    path = get_interpolant(name, prediction)
    x_t, output = torch.randn(2, 2, 4, 8, 8)
    convert = {"velocity": path.posterior_x0, "x0": path.velocity_from_x0, "score": path.velocity_from_score}
    ends = torch.tensor([path.t_zero, path.t_one])
    assert convert[prediction](output, x_t, ends).isfinite().all()
    assert all(value.isfinite().all() for value in path.coefficients(ends))
    for end, nearest in ((path.t_zero, 0.0), (path.t_one, 1.0)):  # no time is left out without a reason
        if end != nearest:
            t = torch.full((2,), nearest)
            values = [convert[prediction](output, x_t, t), *path.coefficients(t)]
            values += [path.score_from_velocity(output, x_t, t)] if prediction == "score" else []
            assert not all((value.abs() < 1e6).all() for value in values)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_paths_run_from_x0_to_x1(name: str) -> None:
    path = get_interpolant(name)
    x0, x1 = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    start, end = (path.sample(x0, x1, torch.tensor([t], dtype=torch.float64)).x_t for t in (0.0, path.t_one))
    torch.testing.assert_close(end, x1, rtol=0, atol=0.05)
    if name != "vp":  # the published VP path keeps 0.7% of x1 at t = 0
        torch.testing.assert_close(start, x0)


def test_unknown_path_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'cubic'.*linear, gvp, vp"):
        get_interpolant("cubic")
    with pytest.raises(ConfigError, match=r"'noise'.*velocity, x0, score"):
        get_interpolant("linear", "noise")
