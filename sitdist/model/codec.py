"""Pixels in [0, 1] <-> latents of unit variance, behind one small interface.

`pca` is a linear patch codec in closed form; `vae` is diffusers' AutoencoderKL. Moments are the mean and the logarithm
of the variance of the latent, stacked on the channels: [B, 2C, h, w].
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sitdist.errors import CodecError
from sitdist.io.arrays import check_numbers, read_tensors, tensors_sha256
from sitdist.io.files import read_json, write_json

PSNR_CEILING = 100.0  # dB: a perfect copy counts as this, so that means stay finite
CONSTANT_DEVIATION = 1e-4  # a component that varies less over the training patches is rounding, not signal
NO_VARIANCE = -30.0  # log-variance of a codec without a posterior
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of a VAE's weights


def latent_mean(moments: Tensor) -> Tensor:
    """The posterior mean [B, C, h, w] of moments [B, 2C, h, w]."""
    return moments.chunk(2, dim=1)[0]


def draw_latent(moments: Tensor, noise: Tensor) -> Tensor:
    """A latent [B, C, h, w] from the posterior, for standard normal `noise` [B, C, h, w]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * noise


class Codec(ABC):
    """Encodes pictures of H x W pixels to latents of `channels` x H/downsample x W/downsample, and decodes them."""

    channels: int
    downsample: int

    @abstractmethod
    def encode_moments(self, images: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] float32 of images [B, 3, H, W] in [0, 1]."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32, clamped to [0, 1], of latents [B, C, h, w]."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes two codecs the same, JSON-able: kind, shapes, scale, SHA-256 of the weights."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write to `folder`, where `load_codec` finds it."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Codec:
        """Move the weights; returns the codec itself."""


class PcaCodec(Codec):
    """Projects every patch on the principal components of the training patches; each channel has unit variance.

    A channel that is constant over the training patches has scale 1, so that rounding does not become signal.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, patch: int) -> None:
        self.mean, self.basis, self.scale = mean, basis, scale  # [3pp], [3pp, C], [C], float32
        self.channels, self.downsample = basis.shape[1], patch

    @classmethod
    def fit(cls, images: Tensor, patch: int, channels: int) -> PcaCodec:
        """Principal components of the patches of images [N, 3, H, W], in float64; signs are fixed."""
        if channels > 3 * patch * patch:
            raise CodecError(
                f"codec.channels {channels}: a patch of {patch}x{patch} pixels has only {3 * patch**2} numbers"
            )
        count, total, scatter = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for chunk in images.split(64):
            patches = _patches(chunk.double(), patch).reshape(-1, 3 * patch * patch)
            count, total, scatter = count + len(patches), total + patches.sum(0), scatter + patches.T @ patches
        mean = total / count
        variance, vectors = torch.linalg.eigh(scatter / count - mean[:, None] * mean)
        basis, variance = vectors.flip(1)[:, :channels], variance.flip(0)[:channels]
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        deviation = variance.clamp_min(0.0).sqrt()
        scale = torch.where(deviation < CONSTANT_DEVIATION, torch.ones_like(deviation), deviation)
        return cls(mean.float(), (basis * largest.sign()).float().contiguous(), scale.float(), patch)

    def encode_moments(self, images: Tensor) -> Tensor:
        rows, columns = (size // self.downsample for size in images.shape[-2:])
        latent = ((_patches(images, self.downsample) - self.mean) @ self.basis) / self.scale  # [B, hw, C]
        latent = latent.transpose(1, 2).reshape(-1, self.channels, rows, columns)
        return torch.cat([latent, torch.full_like(latent, NO_VARIANCE)], dim=1)

    def decode(self, latent: Tensor) -> Tensor:
        rows, columns = latent.shape[-2:]
        patches = (latent.flatten(2).transpose(1, 2) * self.scale) @ self.basis.T + self.mean
        size = (rows * self.downsample, columns * self.downsample)
        images = torch.nn.functional.fold(patches.transpose(1, 2), size, self.downsample, stride=self.downsample)
        return images.clamp(0.0, 1.0)

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean.cpu(), "basis": self.basis.cpu(), "scale": self.scale.cpu()}

    def identity(self) -> dict[str, Any]:
        weights = hashlib.sha256()
        for _, tensor in sorted(self._tensors().items()):
            weights.update(tensor.contiguous().numpy().tobytes())
        return {
            "kind": "pca",
            "channels": self.channels,
            "downsample": self.downsample,
            "latent_scale": self.scale.cpu().tolist(),
            "weights_sha256": weights.hexdigest(),
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / "weights.safetensors")
        write_json(folder / "codec.json", {"kind": "pca", "patch": self.downsample})

    def to(self, device: torch.device | str) -> PcaCodec:
        self.mean, self.basis, self.scale = (x.to(device) for x in (self.mean, self.basis, self.scale))
        return self


class VaeCodec(Codec):
    """diffusers' AutoencoderKL: fed pictures in [-1, 1], its latents multiplied by its own scaling factor.

    `path`: a folder or, unless `local`, a hub id.
    """

    def __init__(self, path: str, dtype: str = "fp32", local: bool = False) -> None:
        self.path, self.dtype = path, DTYPES[dtype]
        self.model = _load_vae(path, self.dtype, local).eval().requires_grad_(False)
        remedy = "give another AutoencoderKL, or download it again"
        check_numbers(self.model.state_dict(), Path(path), remedy, CodecError, [self.dtype])
        config = self.model.config
        scale, shift = config.scaling_factor, config.shift_factor
        if not (_is_number(scale) and scale > 0.0 and (shift is None or _is_number(shift))):
            raise CodecError(
                f"codec.path {path}: scaling_factor {scale} and shift_factor {shift} in its config.json; expected a "
                "positive number, one over the standard deviation of the latents, and a number or null"
            )
        self.scale, self.shift = float(scale), float(shift or 0.0)
        self.channels, self.downsample = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self._weights_sha256 = tensors_sha256(self.model.state_dict())

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        posterior = self.model.encode((2.0 * images - 1.0).to(self.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scale
        log_variance = posterior.logvar.float() + 2.0 * math.log(self.scale)
        return torch.cat([mean, log_variance.clamp_min(NO_VARIANCE)], dim=1)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        images = self.model.decode((latent / self.scale + self.shift).to(self.dtype)).sample
        return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "vae",
            "channels": self.channels,
            "downsample": self.downsample,
            "latent_scale": self.scale,
            "latent_shift": self.shift,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_sha256": self._weights_sha256,
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        dtype = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        self.model.save_pretrained(folder / "vae")
        write_json(folder / "codec.json", {"kind": "vae", "dtype": dtype})

    def to(self, device: torch.device | str) -> VaeCodec:
        self.model.to(device)
        return self


def load_codec(folder: Path, device: torch.device | str = "cpu") -> Codec:
    """The codec that `save` wrote to `folder`; CodecError if it is missing or damaged. No hub is asked."""
    path, remedy = folder / "codec.json", "put the codec back, or build the dataset again"
    values = read_json(path, remedy, CodecError)
    match values:
        case {"kind": "vae", "dtype": "fp32" | "bf16" as dtype}:
            return VaeCodec(str(folder / "vae"), dtype, local=True).to(device)
        case {"kind": "pca", "patch": int(patch)} if patch > 0:
            return _load_pca(folder / "weights.safetensors", patch, remedy).to(device)
    raise CodecError(f"{path}: {str(values)[:80]} describes neither a PCA with its patch nor a VAE; {remedy}")


def _load_pca(path: Path, patch: int, remedy: str) -> PcaCodec:
    tensors = read_tensors(path, None, remedy, CodecError)
    numbers, channels = 3 * patch**2, tensors["scale"].numel() if "scale" in tensors else 0
    expected = {"mean": (numbers,), "basis": (numbers, channels), "scale": (channels,)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected or not 0 < channels <= numbers:
        raise CodecError(f"{path}: holds {str(found)[:160]}, which is no PCA of patches of {patch} pixels; {remedy}")
    mean, basis, scale = (tensors[name].clone() for name in expected)
    if not (scale > 0).all():
        raise CodecError(f"{path}: scale holds {float(scale.min()):g}, and must be positive; {remedy}")
    return PcaCodec(mean, basis, scale, patch)


def psnr(images: Tensor, true_images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, [N] float64, of images [N, 3, H, W] in [0, 1]; at most PSNR_CEILING.

    `mask` [N, H, W]: over these pixels alone; PSNR_CEILING for an image without any.
    """
    squared = (images - true_images).double().square()
    if mask is None:
        error = squared.flatten(1).mean(1)
    else:
        error = (squared.mean(1) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp_min(1)
    return -10.0 * error.clamp_min(10.0 ** (-PSNR_CEILING / 10)).log10()


@torch.no_grad()
def round_trip_psnr(codec: Codec, images: Tensor) -> Tensor:
    """PSNR in dB, [N], of every image [N, 3, H, W] after encoding and decoding: the ceiling of rendered views."""
    return psnr(codec.decode(latent_mean(codec.encode_moments(images))), images)


def _patches(images: Tensor, patch: int) -> Tensor:
    """[B, hw, 3pp] from [B, 3, H, W]."""
    return torch.nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _load_vae(path: str, dtype: torch.dtype, local: bool) -> Any:
    folder = Path(path).expanduser()
    if folder.is_dir():
        path, local = str(folder), True
    elif local or path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise CodecError(
            f"codec.path {path}: no such folder; give a diffusers AutoencoderKL folder or a hub id such as "
            "stabilityai/sd-vae-ft-ema"
        )
    if local:
        _check_vae_size(folder / "config.json")
    from diffusers import AutoencoderKL
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()  # of the lines that it prints besides
    try:  # safetensors, and never a pickle
        model, found = AutoencoderKL.from_pretrained(
            path, torch_dtype=dtype, use_safetensors=True, local_files_only=local, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ValueError(f"has no tensor {min(found['missing_keys'])}")
        return model
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CodecError(
            f"codec.path {path}: no AutoencoderKL could be loaded ({reason}); check the folder or the hub id, "
            "or download it first and give its folder"
        ) from None


def _check_vae_size(path: Path) -> None:
    """CodecError for sizes far beyond those of published VAEs (512 channels, 4 levels), before they are allocated."""
    remedy = "give the folder of a diffusers AutoencoderKL"
    values = {"in_channels": 3, "out_channels": 3, "latent_channels": 4} | read_json(path, remedy, CodecError)
    match values:
        case {
            "block_out_channels": [*levels],
            "layers_per_block": int(layers),
            "latent_channels": latent,
            "in_channels": 3,
            "out_channels": 3,
        } if len(levels) <= 8 and layers <= 8 and all(type(n) is int and 0 < n <= 4096 for n in [*levels, latent]):
            return
    shown = {name: values.get(name) for name in ("block_out_channels", "layers_per_block", "latent_channels")}
    raise CodecError(f"{path}: {str(shown)[:160]}: not the sizes of an AutoencoderKL of RGB pictures; {remedy}")
