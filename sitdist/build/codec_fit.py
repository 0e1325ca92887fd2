"""Fit an AutoencoderKL to the training views of a recipe, on any number of processes.

The batches are a pure function of (views, seed, step), as in `sitdist.train.trainer`; there are no checkpoints.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from sitdist.build.shard import Split
from sitdist.build.writer import open_splits
from sitdist.config.recipe import Recipe
from sitdist.distributed.accelerator import processes
from sitdist.distributed.ranks import Ranks
from sitdist.errors import CodecError, ConfigError, DataError, NonFiniteError
from sitdist.flow import draws
from sitdist.io.atomic import cannot_write, check_free, remove_leftovers, temporary_name, write_folder
from sitdist.io.files import require_memory
from sitdist.model.autoencoder import CodecLoss, PerceptualDistance, RoundTrip, latent_sums, make_vae, scaling_factor
from sitdist.model.codec import VaeCodec, round_trip_psnr
from sitdist.train.schedule import learning_rate

log = logging.getLogger(__name__)
HELD_OUT = 64  # one in HELD_OUT views, numbers 0, HELD_OUT, ..., is held out for the round trip's PSNR
VIEW_BATCH = 64  # number of views that are rendered or measured together
WARMUP = 0.05  # share of the steps
CLIP_NORM = 1.0


@dataclass(frozen=True)
class CodecFitOptions:
    """Options of a fit: `channels` of each level of the network, channels of the latent, and the training.

    `batch` counts the views of all processes together. `views` is the largest number of training views to use.
    `precision` applies to the forward and backward pass; the weights are float32.
    """

    channels: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    steps: int = 2000
    batch: int = 32
    views: int = 4000
    lr: float = 2e-3
    loss: Literal["mse", "l1"] = "mse"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class CodecFitResult:
    """Mean PSNR in dB of the round trip over `held_out` held-out views, and the scaling factor of the latents."""

    psnr: float
    held_out: int
    scaling_factor: float


def fit_codec(
    recipe: Recipe,
    folder: Path,
    options: CodecFitOptions,
    make_perceptual: Callable[[torch.device], PerceptualDistance] | None = None,
) -> CodecFitResult:
    """Fit a codec to the recipe's training views and write a diffusers folder; each process calls this.

    `make_perceptual` returns a perceptual distance for a device. DataError if the folder exists, NonFiniteError if the
    loss is not finite. The folder appears only when it is complete.
    """
    with processes(options.precision) as (accelerator, ranks):
        with ranks.raise_together():
            _check(folder, options, ranks.world)
            _check_memory(recipe.image_size, options, ranks.world)
            split = _views_to_fit(recipe, options.views)
            perceptual = None if make_perceptual is None else make_perceptual(accelerator.device)
            fit = CodecFit(recipe.image_size, options, perceptual, accelerator, ranks)
        with shared_views(split, recipe.image_size, folder, ranks) as views:
            fit.run_steps(views)
            factor = fit.measure_scale(views)
            with ranks.raise_together():
                if ranks.rank == 0:
                    fit.write(folder, factor)
            return CodecFitResult(*fit.held_out_psnr(views, folder), factor)


def _check(folder: Path, options: CodecFitOptions, world: int) -> None:
    check_free(folder)
    if options.batch % world:
        below, above = options.batch // world * world, -(-options.batch // world) * world
        raise ConfigError(
            f"--batch {options.batch}: cannot be divided by {world} processes; "
            f"give {f'{below} or {above}' if below else above}, or start another number of processes"
        )


def _check_memory(image_size: int, options: CodecFitOptions, world: int) -> None:
    """OutOfMemoryError if the training cannot fit into memory; a cautious bound."""
    weights = 100 * sum(channels**2 for channels in options.channels)  # roughly
    kept = 8 * options.channels[0] * image_size**2 * (options.batch // world)
    what = f"fitting a codec of {weights / 1e6:,.0f} M weights with {options.batch // world} views a step"
    require_memory(16 * weights + kept, what, "give smaller --channels or a smaller --batch")


def _views_to_fit(recipe: Recipe, limit: int) -> Split:
    """The first training views; none of them is in the val split."""
    train = open_splits(recipe, ["train"])["train"]
    split = Split("train", train.source, train.indices[:limit])
    if len(split) < 2:
        raise CodecError(f"{len(split)} view to fit on; at least 2 are needed, one of them held out")
    return split


class CodecFit:
    """One process's part of the fit of a VAE; all processes have the same weights."""

    def __init__(
        self,
        image_size: int,
        options: CodecFitOptions,
        perceptual: PerceptualDistance | None,
        accelerator: Accelerator,
        ranks: Ranks,
    ) -> None:
        self.options, self.accelerator, self.ranks = options, accelerator, ranks
        torch.manual_seed(options.seed)
        self.vae = make_vae(image_size, options.channels, options.latent_channels)
        self.raw_model = RoundTrip(self.vae).to(accelerator.device)
        self.raw_optimizer = torch.optim.AdamW(self.raw_model.parameters(), options.lr, weight_decay=0.0, fused=True)
        self.loss = CodecLoss(options.loss, perceptual)
        size = image_size // 2 ** (len(options.channels) - 1)
        self.latent_shape = (options.latent_channels, size, size)
        if perceptual is not None:  # fail early if it is not defined on pictures of this size
            perceptual(*torch.zeros(2, 1, 3, image_size, image_size, device=accelerator.device))

    def run_steps(self, views: np.ndarray) -> None:
        """Train on the views [N, 3, H, W] uint8 that are not held out."""
        model, optimizer = self.accelerator.prepare(self.raw_model, self.raw_optimizer)
        started, steps = time.perf_counter(), self.options.steps
        for step in (progress := tqdm(range(steps), "codec", unit="step", disable=self.ranks.rank > 0)):
            images, noise = self.batch(views, step)
            decoded, moments = model(images, noise)
            loss = self.loss(decoded, moments, images).mean()
            self.accelerator.backward(loss)
            norm = self.accelerator.clip_grad_norm_(self.raw_model.parameters(), CLIP_NORM)
            self._check_finite(step, float(loss.detach()), float(norm))
            rate = learning_rate(
                step, base=self.options.lr, steps=steps, kind="cosine", warmup_steps=math.ceil(WARMUP * steps)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
        log.info("%d steps, %.2f a second", steps, steps / (time.perf_counter() - started))

    def batch(self, views: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        """This process's share of a step's pictures [B, 3, H, W] in [0, 1], and the noise for their latents.

        Views are drawn with replacement, and every number is keyed by (seed, global position).
        """
        local = self.options.batch // self.ranks.world
        first = step * self.options.batch + self.ranks.rank * local
        positions = torch.arange(first, first + local)
        fitted = len(views) - _held_out(len(views))
        drawn = (draws.uniform(self.options.seed, "codec views", positions, 1)[:, 0] * fitted).long()
        noise = draws.normal(self.options.seed, "codec posterior", positions, math.prod(self.latent_shape))
        images = _pictures(views[_fitted_view(drawn).numpy()], self.accelerator.device)
        return images, noise.reshape(-1, *self.latent_shape).to(self.accelerator.device)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if any(self.ranks.any(not (math.isfinite(loss) and math.isfinite(norm)))):
            with self.ranks.raise_together():
                raise NonFiniteError(
                    f"step {step}: the loss is not finite ({loss:g}, gradient norm {norm:g}); nothing was written; "
                    f"lower --lr {self.options.lr:g}, or use --precision fp32"
                )

    @torch.no_grad()
    def measure_scale(self, views: np.ndarray) -> float:
        """One over the standard deviation of the latents of the fitted views."""
        self.vae.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        fitted = _fitted_view(torch.arange(len(views) - _held_out(len(views))))
        for rows in _share(fitted, self.ranks):
            images = _pictures(views[rows.numpy()], self.accelerator.device)
            posterior = self.vae.encode(2.0 * images - 1.0).latent_dist
            sums += latent_sums(torch.cat([posterior.mean, posterior.logvar], dim=1))
        sums = self.ranks.sum(sums)
        with self.ranks.raise_together():
            return scaling_factor(sums)

    def write(self, folder: Path, factor: float) -> None:
        """Write the VAE as a new folder, whole or not at all."""
        self.vae.register_to_config(scaling_factor=factor)
        write_folder(folder, self.vae.save_pretrained)

    def held_out_psnr(self, views: np.ndarray, folder: Path) -> tuple[float, int]:
        """Mean PSNR in dB over the held-out views, and their number, with the codec as a build loads it."""
        total = torch.zeros((), dtype=torch.float64)
        with self.ranks.raise_together():
            codec = VaeCodec(str(folder)).to(self.accelerator.device)
            held_out = torch.arange(0, len(views), HELD_OUT)
            for rows in _share(held_out, self.ranks):
                images = _pictures(views[rows.numpy()], self.accelerator.device)
                total += round_trip_psnr(codec, images).double().sum().cpu()
        return float(self.ranks.sum(total)) / len(held_out), len(held_out)


def _held_out(views: int) -> int:
    """The number of held-out views among the first `views` ones."""
    return -(-views // HELD_OUT)


def _fitted_view(order: Tensor) -> Tensor:
    """The index of the `order`th view that is not held out."""
    return order + order // (HELD_OUT - 1) + 1


def _share(numbers: Tensor, ranks: Ranks) -> list[Tensor]:
    """This process's contiguous share of these numbers, in batches of VIEW_BATCH; it may be empty."""
    mine = numbers.tensor_split(ranks.world)[ranks.rank]
    return [rows for rows in mine.split(VIEW_BATCH) if len(rows)]


def _pictures(views: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(views).to(device).float() / 255.0


# --------------------------------------------------------------------------------------------------------------- views


@contextmanager
def shared_views(split: Split, size: int, folder: Path, ranks: Ranks) -> Iterator[np.ndarray]:
    """The pictures of all views, uint8 [N, 3, H, W], which the processes make together and share.

    They are in a memory-mapped file beside `folder`. It is unlinked once it is mapped, so that it never outlives the
    processes. DataError if a process does not see the file.
    """
    shape = (len(split), 3, size, size)
    path: Path | None = None
    try:
        with ranks.raise_together():
            if ranks.rank == 0:
                path = _create_file(folder, math.prod(shape))
        path = ranks.broadcast(path)
        with ranks.raise_together():
            _write_share(path, split, math.prod(shape[1:]), ranks)
        with ranks.raise_together():
            views = np.memmap(path, np.uint8, "r", shape=shape)
    finally:
        if path is not None and ranks.rank == 0:
            path.unlink(missing_ok=True)
    yield views


def _create_file(folder: Path, size: int) -> Path:
    """Create an empty file of `size` bytes beside `folder`, and remove what a killed fit left there."""
    path = temporary_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        with path.open("xb") as file:
            file.truncate(size)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return path


def _write_share(path: Path, split: Split, view_bytes: int, ranks: Ranks) -> None:
    """Make this process's share of the views and write them to their places."""
    mine = _share(torch.arange(len(split)), ranks)
    if not path.is_file():
        raise DataError(
            f"{path}: process {ranks.rank} does not see this file of process 0; "
            "give an --out on a disk that all processes share"
        )
    with tqdm(total=sum(map(len, mine)), desc="views", unit="view", disable=ranks.rank > 0) as bar:
        for rows in mine:
            images = split.source.images(split.indices[rows].tolist())
            _write_at(path, int(rows[0]) * view_bytes, (images * 255.0).round().to(torch.uint8))
            bar.update(len(rows))


def _write_at(path: Path, offset: int, pictures: Tensor) -> None:
    try:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(pictures.contiguous().numpy().tobytes())
    except OSError as error:
        raise cannot_write(path, error) from None
