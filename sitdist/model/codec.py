"""Pixels in [0, 1] <-> latents of unit variance, behind one small interface.

`pca` is a linear patch codec in closed form; `vae` is diffusers' AutoencoderKL. Moments are the mean and the logarithm
of the variance of the latent, stacked on the channels: [B, 2C, h, w].
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sitdist.errors import CodecError

CONSTANT_DEVIATION = 1e-4  # a component that varies less over the training patches is rounding, not signal
NO_VARIANCE = -30.0  # log-variance of a codec without a posterior


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
        (folder / "codec.json").write_text(json.dumps({"kind": "pca", "patch": self.downsample}, indent=1) + "\n")

    def to(self, device: torch.device | str) -> PcaCodec:
        self.mean, self.basis, self.scale = (x.to(device) for x in (self.mean, self.basis, self.scale))
        return self


class VaeCodec(Codec):
    """diffusers' AutoencoderKL: fed pictures in [-1, 1], its latents multiplied by its own scaling factor."""

    def __init__(self, path: str, dtype: str = "fp32") -> None:
        self.path, self.dtype = path, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        self.model = _load_vae(path, self.dtype).eval().requires_grad_(False)
        config = self.model.config
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
        if not 0.0 < self.scale < math.inf:
            raise CodecError(
                f"codec.path {path}: scaling_factor {self.scale:g} in its config.json; expected a positive number, one "
                "over the standard deviation of the latents"
            )
        self.channels, self.downsample = config.latent_channels, 2 ** (len(config.block_out_channels) - 1)
        self._weights_sha256 = _state_sha256(self.model.state_dict())

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
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        self.model.save_pretrained(folder / "vae")
        (folder / "codec.json").write_text(json.dumps({"kind": "vae", "dtype": dtype}, indent=1) + "\n")

    def to(self, device: torch.device | str) -> VaeCodec:
        self.model.to(device)
        return self


def load_codec(folder: Path, device: torch.device | str = "cpu") -> Codec:
    """The codec that `save` wrote to `folder`; CodecError if it is missing or damaged."""
    try:
        description = json.loads((folder / "codec.json").read_text())
        if description["kind"] == "vae":
            return VaeCodec(str(folder / "vae"), description["dtype"]).to(device)
        weights = load_file(folder / "weights.safetensors")
        return PcaCodec(weights["mean"], weights["basis"], weights["scale"], description["patch"]).to(device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CodecError(f"{folder}: no readable codec ({error}); build the dataset again") from None


@torch.no_grad()
def round_trip_psnr(codec: Codec, images: Tensor) -> Tensor:
    """PSNR in dB, [N], of every image [N, 3, H, W] after encoding and decoding: the ceiling of rendered views."""
    decoded = codec.decode(latent_mean(codec.encode_moments(images)))
    return -10.0 * (decoded - images).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def _patches(images: Tensor, patch: int) -> Tensor:
    """[B, hw, 3pp] from [B, 3, H, W]."""
    return torch.nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)


def _state_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_vae(path: str, dtype: torch.dtype) -> Any:
    folder = Path(path).expanduser()
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") != 1
    if folder.is_dir():
        source = str(folder)
    elif looks_local:
        raise CodecError(
            f"codec.path {path}: no such folder; give a diffusers AutoencoderKL folder or a hub id such as "
            "stabilityai/sd-vae-ft-ema"
        )
    else:
        source = path
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)  # and never a pickle
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CodecError(
            f"codec.path {path}: no AutoencoderKL could be loaded ({reason}); check the folder or the hub id, "
            "or download it first and give its folder"
        ) from None
