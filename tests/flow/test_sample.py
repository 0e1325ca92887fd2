"""Latents from poses by every kind of equation, with noise that belongs to the sample."""

import pytest
import torch
from gaussian import GaussianFlow

from sitdist.flow.endpoint import Endpoint
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.sample import STOCHASTIC, SampleOptions, sample_latents

SHAPE = torch.Size((4, 2, 2))


class Unconditional(GaussianFlow):
    """x1 ~ N(1.5, 0.5^2) whatever the pose."""

    def __call__(self, x_t, t, y, drop_labels=None, pose=None):
        return super().__call__(x_t, t, y)


class Labelled:
    """Velocity 3 with a label and 1 without one, where x does not matter."""

    def __call__(self, x_t, t, y, drop_labels=None):
        with_label = torch.full_like(x_t, 3.0)
        return with_label if drop_labels is None else torch.where(drop_labels[:, None, None, None], 1.0, with_label)


def sampled(model, options, count=4, endpoint=Endpoint(sigma=0.0), first=0):  # noqa: B008
    poses = torch.zeros(count, 4, 4)
    y, positions = torch.zeros(count, dtype=torch.int64), torch.arange(first, first + count)
    return sample_latents(model, get_interpolant("linear"), endpoint, poses, y, SHAPE, options, 0, "test", positions)


@pytest.mark.parametrize(("scale", "expected"), [(None, 3.0), (1.0, 3.0), (0.0, 1.0), (2.5, 6.0)])
def test_guidance_extrapolates_from_the_velocity_without_a_label(scale, expected):
    out = sampled(Labelled(), SampleOptions("euler", 4, guidance=scale))
    torch.testing.assert_close(out, torch.full((4, *SHAPE), expected))


@pytest.mark.parametrize("generator", [*STOCHASTIC, "heun"])
def test_samples_of_a_gaussian_flow_have_its_mean_and_deviation(generator):
    flow = Unconditional(get_interpolant("linear"))
    options = SampleOptions(generator, 100, diffusion="sigma", last_step_size=0.01)
    out = sampled(flow, options, count=2000, endpoint=Endpoint("gaussian", sigma=1.0))
    assert float(out.mean()) == pytest.approx(1.5, abs=0.02)
    assert float(out.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("generator", [*STOCHASTIC, "heun"])
def test_a_sample_does_not_depend_on_the_batch_around_it(generator):
    flow, endpoint = Unconditional(get_interpolant("linear")), Endpoint("gaussian", sigma=1.0)
    options = SampleOptions(generator, 5, diffusion="sigma")
    many = sampled(flow, options, count=6, endpoint=endpoint)
    few = sampled(flow, options, count=2, endpoint=endpoint, first=3)
    torch.testing.assert_close(few, many[3:5], rtol=0, atol=0)
