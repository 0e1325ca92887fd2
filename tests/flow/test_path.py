"""Paths: the published values, and the identities between endpoint, velocity and posterior mean."""

from pathlib import Path as FilePath

import pytest
import torch
from safetensors.torch import load_file

from sitdist.errors import ConfigError
from sitdist.flow.path import PATHS, get_path

REFERENCE = load_file(FilePath(__file__).parents[1] / "reference" / "sit_tiny.safetensors")
PUBLISHED_NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}


@pytest.mark.parametrize("name", PATHS)
def test_path_values_equal_the_published_code(name: str) -> None:
    path, t = get_path(name), REFERENCE["in.t_mid"]
    sample = path.sample(REFERENCE["in.x0"], REFERENCE["in.x1"], t)
    published = {key: REFERENCE[f"path.{PUBLISHED_NAMES[name]}.{key}"] for key in ("x_t", "u_t", "noise_from_velocity")}
    posterior = path.posterior_x0(sample.velocity, sample.x_t, t)
    for value, expected in zip((sample.x_t, sample.velocity, posterior), published.values(), strict=True):
        assert (value - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_of_the_point(name: str) -> None:
    path, h = get_path(name), 1e-6
    x0, x1 = torch.randn(2, 7, 4, 8, 8, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    difference = (path.sample(x0, x1, t + h).x_t - path.sample(x0, x1, t - h).x_t) / (2 * h)
    torch.testing.assert_close(path.sample(x0, x1, t).velocity, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_paths_run_from_x0_to_x1(name: str) -> None:
    path = get_path(name)
    x0, x1 = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    start, end = (path.sample(x0, x1, torch.tensor([t], dtype=torch.float64)).x_t for t in (0.0, path.t_one))
    torch.testing.assert_close(end, x1, rtol=0, atol=0.05)
    if name != "vp":  # the published VP path keeps 0.7% of x1 at t = 0
        torch.testing.assert_close(start, x0)


def test_posterior_at_t_one_on_the_linear_path_is_x1_less_the_velocity() -> None:
    x1, velocity = torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(get_path("linear").posterior_x0(velocity, x1, torch.ones(3)), x1 - velocity)


def test_unknown_path_is_named_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'cubic'.*linear, gvp, vp"):
        get_path("cubic")
