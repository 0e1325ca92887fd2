"""What a VAE is fitted to: known losses, known divergences, and the scale of latents whose variance is known."""

import math

import pytest
import torch

from sitdist.errors import CodecError
from sitdist.model.autoencoder import (
    KL_WEIGHT,
    PERCEPTUAL_WEIGHT,
    CodecLoss,
    RoundTrip,
    kl_divergence,
    latent_sums,
    make_vae,
    scaling_factor,
)


def moments(mean, variance, shape=(2, 4, 3, 3)):
    return torch.cat([torch.full(shape, mean), torch.full(shape, math.log(variance))], dim=1)


def test_the_divergence_is_known_for_known_posteriors():
    numbers = 4 * 3 * 3
    torch.testing.assert_close(kl_divergence(moments(0.0, 1.0)), torch.zeros(2))
    torch.testing.assert_close(kl_divergence(moments(2.0, 1.0)), torch.full((2,), 2.0 * numbers))
    expected = 0.5 * (math.e - 1.0 - 1.0) * numbers
    torch.testing.assert_close(kl_divergence(moments(0.0, math.e)), torch.full((2,), expected))


@pytest.mark.parametrize(("kind", "error"), [("mse", 0.04), ("l1", 0.2)])
def test_the_loss_of_a_constant_offset_is_known(kind, error):
    images = torch.full((2, 3, 4, 4), 0.5)
    nothing, far = moments(0.0, 1.0), moments(2.0, 1.0)
    loss = CodecLoss(kind)
    torch.testing.assert_close(loss(images + 0.1, nothing, images), torch.full((2,), error))  # 0.2 in [-1, 1]
    torch.testing.assert_close(loss(images, far, images), torch.full((2,), KL_WEIGHT * 72.0))
    perceptual = CodecLoss(kind, lambda decoded, true: 10.0 * (decoded - true).flatten(1).mean(1))
    expected = error + PERCEPTUAL_WEIGHT[kind] * 1.0
    torch.testing.assert_close(perceptual(images + 0.1, nothing, images), torch.full((2,), expected))


def test_drawn_latents_have_unit_variance_once_they_are_scaled():
    sign = torch.tensor([1.0, -1.0]).repeat(50)[:, None, None, None]
    means, log_variance = 5.0 + sign.expand(100, 4, 2, 2), torch.full((100, 4, 2, 2), math.log(3.0))
    known = torch.cat([means, log_variance], dim=1)  # variance 1 of the means, 3 of the posteriors; the mean is no part
    assert scaling_factor(latent_sums(known)) == pytest.approx(0.5)
    in_parts = latent_sums(known[:30]) + latent_sums(known[30:])
    assert scaling_factor(in_parts) == pytest.approx(0.5)


@pytest.mark.parametrize("mean", [0.0, math.nan, math.inf])
def test_latents_that_do_not_vary_or_are_not_finite_have_no_scale(mean):
    shape = (2, 4, 3, 3)
    flat = torch.cat([torch.full(shape, mean), torch.full(shape, -math.inf)], dim=1)
    with pytest.raises(CodecError, match=r"have variance .*, so no scaling factor; lower --lr"):
        scaling_factor(latent_sums(flat))


def test_a_round_trip_draws_the_latent_and_keeps_pictures_in_zero_to_one():
    torch.manual_seed(0)
    vae = make_vae(16, (4, 8)).eval()
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        decoded, found = RoundTrip(vae)(images, noise)
        posterior = vae.encode(2.0 * images - 1.0).latent_dist
        expected = vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(found, torch.cat([posterior.mean, posterior.logvar], dim=1))
    torch.testing.assert_close(2.0 * decoded - 1.0, expected)


@pytest.mark.parametrize(
    ("size", "channels", "latent_channels", "message"),
    [
        (16, (4,) * 5, 4, "16 pixels with 5 levels, which shrink by 16, and 4 latent channels"),
        (16, (4, 4), 3, "3 latent channels: the latent needs an even size and a multiple of 4 channels to hold a pose"),
    ],
)
def test_a_network_whose_latents_could_not_hold_a_pose_is_refused(size, channels, latent_channels, message):
    with pytest.raises(CodecError, match=message):
        make_vae(size, channels, latent_channels)


def test_a_network_has_the_channels_and_the_size_that_are_asked_for():
    vae = make_vae(16, (4, 8, 8), latent_channels=8)
    assert vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean.shape == (1, 8, 4, 4)
    assert [block.resnets[0].conv1.out_channels for block in vae.encoder.down_blocks] == [4, 8, 8]
