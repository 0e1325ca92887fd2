"""Fit a small AutoencoderKL on a dataset's own views."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sitdist.errors import CodecError

HELD_OUT = 64  # every such-and-so-many-th view, for the round trip's PSNR


def fit_vae(
    images: Tensor,
    folder: Path,
    block_out_channels: tuple[int, ...] = (16, 32, 32),
    latent_channels: int = 4,
    steps: int = 2000,
    batch: int = 32,
    learning_rate: float = 2e-3,
    kl_weight: float = 1e-6,
    seed: int = 0,
) -> float:
    """Train on images [N, 3, H, W] in [0, 1], write a diffusers folder, and return the held-out PSNR in dB.

    The loss is the mean squared error and a small KL term. `config.json` holds the measured scaling factor: one over
    the latent's standard deviation. CodecError if the folder exists.
    """
    from diffusers import AutoencoderKL

    _check(images, folder, len(block_out_channels), latent_channels)
    torch.manual_seed(seed)
    held_out, training = images[::HELD_OUT], images[torch.arange(len(images)) % HELD_OUT != 0]
    levels = len(block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=block_out_channels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=math.gcd(8, *block_out_channels),
        sample_size=images.shape[-1],
    )
    optimizer = torch.optim.AdamW(vae.parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in (progress := tqdm(range(steps), "codec", unit="step")):
        x = training[torch.randint(len(training), (batch,))] * 2.0 - 1.0
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = (reconstruction - x).square().mean()
        loss = error + kl_weight * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(mse=f"{float(error.detach()):.4f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk * 2.0 - 1.0).latent_dist.mean for chunk in training[:1024].split(64)])
        decoded = torch.cat([vae.decode(vae.encode(c * 2.0 - 1.0).latent_dist.mean).sample for c in held_out.split(64)])
    vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    psnr = -10.0 * ((decoded * 0.5 + 0.5).clamp(0.0, 1.0) - held_out).square().flatten(1).mean(1).log10()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    vae.save_pretrained(temporary)
    temporary.rename(folder)
    print(
        f"{folder}: held-out round trip {float(psnr.mean()):.2f} dB on {len(held_out)} views, "
        f"scaling factor {vae.config.scaling_factor:.4f}"
    )
    return float(psnr.mean())


def _check(images: Tensor, folder: Path, levels: int, latent_channels: int) -> None:
    """CodecError for what could not be fitted, or not hold a pose afterwards, before any work is done."""
    if folder.exists():
        raise CodecError(f"{folder}: already exists; give another --out, or remove it")
    if len(images) < 2:
        raise CodecError(f"{len(images)} view to fit on; at least 2 are needed, one of them held out")
    shrink = 2 ** (levels - 1)
    if images.shape[-1] % (2 * shrink) or latent_channels % 4:
        raise CodecError(
            f"{images.shape[-1]} pixels with {levels} levels, which shrink by {shrink}, and {latent_channels} latent "
            "channels: the latent needs an even size and a multiple of 4 channels to hold a pose"
        )
