"""What an AutoencoderKL is fitted to: its size, the pass that training sees, the loss, and the scale of its latents.

`sitdist.build.codec_fit` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sitdist.errors import CodecError
from sitdist.model.codec import draw_latent

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]  # of pictures [B, 3, H, W] in [0, 1]: [B], differentiable
KL_WEIGHT = 1e-6  # of the sum over a view's latent, beside a mean over pixels
PERCEPTUAL_WEIGHT = {"mse": 0.1, "l1": 1.0}  # as sd-vae-ft-mse and sd-vae-ft-ema were trained


def make_vae(image_size: int, block_out_channels: tuple[int, ...] = (16, 32, 32), latent_channels: int = 4) -> Any:
    """A diffusers AutoencoderKL for square pictures, with random weights; CodecError if no latent could hold a pose.

    Every level but the last halves the size; one residual block a level (two in the decoder).
    """
    shrink = 2 ** (len(block_out_channels) - 1)
    if image_size % (2 * shrink) or latent_channels % 4:
        raise CodecError(
            f"{image_size} pixels with {len(block_out_channels)} levels, which shrink by {shrink}, and "
            f"{latent_channels} latent channels: the latent needs an even size and a multiple of 4 channels to hold a "
            "pose"
        )
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(block_out_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_out_channels),
        block_out_channels=block_out_channels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=math.gcd(8, *block_out_channels),
        sample_size=image_size,
    )


class RoundTrip(nn.Module):
    """Pictures through a VAE and back, by a latent drawn from the posterior."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded pictures [B, 3, H, W], not clamped, of images in [0, 1], and moments [B, 2C, h, w] of their latents.

        `noise` [B, C, h, w] is standard normal.
        """
        posterior = self.vae.encode(2.0 * images - 1.0).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).float()
        decoded = self.vae.decode(draw_latent(moments, noise)).sample.float()
        return 0.5 * decoded + 0.5, moments


@dataclass(frozen=True)
class CodecLoss:
    """Error of the round trip + weight * perceptual distance, if there is one, + KL_WEIGHT * divergence; a view each.

    The error is the mean over pixels of the square (`mse`) or the absolute value (`l1`) of differences of colours in
    [-1, 1]. Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", 2022, appendix G,
    without its discriminator.
    """

    kind: Literal["mse", "l1"] = "mse"
    perceptual: PerceptualDistance | None = None

    def __call__(self, decoded: Tensor, moments: Tensor, images: Tensor) -> Tensor:
        """Loss [B] of what RoundTrip gave for images [B, 3, H, W]."""
        difference = 2.0 * (decoded - images).flatten(1)
        error = difference.square().mean(1) if self.kind == "mse" else difference.abs().mean(1)
        loss = error + KL_WEIGHT * kl_divergence(moments)
        if self.perceptual is not None:
            loss = loss + PERCEPTUAL_WEIGHT[self.kind] * self.perceptual(decoded, images)
        return loss


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(posterior || standard normal) of moments [B, 2C, h, w], summed over the latent, in nats; [B].

    Kingma and Welling, "Auto-encoding variational Bayes", 2014, appendix B.
    """
    mean, log_variance = moments.flatten(1).chunk(2, dim=1)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)


def latent_sums(moments: Tensor) -> Tensor:
    """What `scaling_factor` needs to know of moments [B, 2C, h, w]; may be added up over batches. float64 [3].

    The number of latent numbers, the sum and the sum of squares that drawing them gives in the mean.
    """
    mean, log_variance = moments.double().chunk(2, dim=1)
    second = mean.square() + log_variance.exp()
    return torch.stack([torch.tensor(float(mean.numel())), mean.sum().cpu(), second.sum().cpu()])


def scaling_factor(sums: Tensor) -> float:
    """One over the standard deviation of drawn latents, from their `latent_sums` [3]; CodecError if there is none."""
    count, first, second = sums.tolist()
    variance = second / count - (first / count) ** 2
    if not (math.isfinite(variance) and variance > 0.0):
        raise CodecError(
            f"the latents of the training views have variance {variance:g}, so no scaling factor; "
            "lower --lr, or use --precision fp32"
        )
    return variance**-0.5
