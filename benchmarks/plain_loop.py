"""The baselines of `python -m benchmarks train`: a training loop as tutorials and research code usually write it.

Eager, float32, torch's default AdamW, an EMA that loops over the parameters, and the loss read back at every step.
Pictures are encoded inside the step, or latents are precomputed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sitdist.flow.interpolant import Interpolant
from sitdist.flow.loss import flow_loss
from sitdist.geometry.packing import pack

SD_CHANNELS = (128, 256, 512, 512)  # of the autoencoder of Stable Diffusion (Rombach et al. 2022), 8 pixels a latent
SD_SCALE = 0.18215
EMA_DECAY = 0.9999


class PlainLoop:
    """Trains `model` on samples and their poses: pictures [N, 3, H, W] with a `vae` of diffusers, or else latents."""

    def __init__(
        self, model: nn.Module, path: Interpolant, samples: Tensor, packed_pose: Tensor, batch: int, vae: Any
    ) -> None:
        self.device = samples.device
        self.model, self.path, self.vae = model.train(), path, vae
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
        labels = torch.zeros(len(samples), dtype=torch.int64)
        dataset = TensorDataset(samples.cpu(), packed_pose.cpu(), labels)
        self.loader = DataLoader(dataset, batch, shuffle=True, drop_last=True)
        self.batches = self._endless()
        self.total = 0.0

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> float:
        """One update; returns the loss."""
        x, packed_pose, y = (each.to(self.device) for each in next(self.batches))
        if self.vae is not None:
            with torch.no_grad():
                x = self.vae.encode(2.0 * x - 1.0).latent_dist.sample() * SD_SCALE
        x0 = pack(packed_pose, *x.shape[1:]) + torch.randn_like(x)
        t = torch.rand(len(x), device=self.device)
        loss = flow_loss(self.model, self.path, x0, x, t, y).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                averaged.mul_(EMA_DECAY).add_(parameter, alpha=1.0 - EMA_DECAY)
        self.total += loss.item()
        return loss.item()


def random_vae(channels: tuple[int, ...] = SD_CHANNELS, latent_channels: int = 4) -> nn.Module:
    """An AutoencoderKL of Stable Diffusion's size with random weights: as slow as a trained one."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=min(32, *channels),
    )
    return vae.eval().requires_grad_(False)
