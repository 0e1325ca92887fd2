"""Picture metrics of single views; PSNR is `sitdist.model.codec.psnr`.

Every picture is a float32 tensor [B, 3, H, W] in [0, 1]; every metric gives one number a view, [B].
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sitdist.errors import ConfigError, DataError
from sitdist.model.codec import psnr

SSIM_WINDOW = 11  # pixels: a Gaussian of deviation 1.5, Wang et al. 2004
LPIPS_MINIMUM_SIZE = 32  # pixels: AlexNet's last layer has nothing left to look at below 31
OBJECT_TOLERANCE = 4.5 / 255.0  # a colour this far from the background belongs to the object
LPIPS_NOT_MEASURED = "not measured: set evaluate.lpips_backbone"


def mean_absolute_error(images: Tensor, true_images: Tensor) -> Tensor:
    """Mean over pixels and colours of |image - true image|; [B]."""
    return (images - true_images).abs().flatten(1).mean(1)


def object_psnr(images: Tensor, true_images: Tensor, background: Tensor) -> list[float | None]:
    """PSNR of every view as `psnr`, over the object's pixels alone: those where the true view shows no background.

    `background` [3] is its colour; a pixel is the object's where a colour differs by more than OBJECT_TOLERANCE. None
    where a view shows no object.
    """
    mask = object_mask(true_images, background)  # [B, H, W]
    values = psnr(images, true_images, mask).tolist()
    return [value if shown else None for value, shown in zip(values, mask.flatten(1).any(1).tolist(), strict=True)]


def object_mask(true_images: Tensor, background: Tensor) -> Tensor:
    """Whether each pixel [B, H, W] of true views [B, 3, H, W] shows the object and not the colour [3] behind it."""
    return ((true_images - background.to(true_images)[:, None, None]).abs() > OBJECT_TOLERANCE).any(1)


def background_colour(true_images: Tensor) -> Tensor | None:
    """The colour [3] that most corners of pictures [B, 3, H, W] have, within OBJECT_TOLERANCE; None if less than half.

    For objects before a plain background: their corners show it in most views.
    """
    corners = true_images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].permute(0, 2, 1).reshape(-1, 3)  # [4 B, 3]
    same = (corners[:, None] - corners[None]).abs().amax(-1) <= OBJECT_TOLERANCE  # [4 B, 4 B]
    supporters = same.sum(1)
    best = int(supporters.argmax())
    return corners[same[best]].median(0).values if 2 * int(supporters[best]) >= len(corners) else None


def ssim(images: Tensor, true_images: Tensor) -> Tensor:
    """Structural similarity of every view (Wang et al. 2004: 11x11 Gaussian window, data range 1), in float32; [B].

    Pictures with a side shorter than the window have no SSIM: DataError.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_size("SSIM", images, SSIM_WINDOW)
    values = structural_similarity_index_measure(
        images.float(), true_images.float(), sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)  # a pair only with return_contrast_sensitivity
    return values.reshape(len(images))


def _check_size(metric: str, images: Tensor, minimum: int) -> None:
    height, width = images.shape[-2:]
    if min(height, width) < minimum:
        raise DataError(
            f"{metric} is not defined on pictures of {width}x{height} pixels; it needs {minimum} pixels a side"
        )


class Lpips:
    """Learned perceptual distance (Zhang et al. 2018, version 0.1) with a backbone read from a local file.

    `backbone` is the state dict of torchvision's AlexNet or VGG16, recognised by its first layer; nothing is fetched.
    The calibrated linear layers come with the lpips package. Which weights were used is told by `sha256`.
    """

    def __init__(self, backbone: str | Path, device: torch.device | str = "cpu") -> None:
        path = Path(backbone)
        if not path.is_file():
            raise ConfigError(
                f"evaluate.lpips_backbone {path}: no such file; give a torchvision AlexNet or VGG16 state dict, or null"
            )
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        features = _backbone_features(path)
        self.net = _backbone_kind(path, features)
        self._network = _lpips_network(self.net)
        self._load(path, features)
        self._network.to(device)

    def _load(self, path: Path, features: dict[str, Tensor]) -> None:
        """Copy every feature layer; lpips keeps torchvision's layer numbers inside its slices."""
        backbone = self._network.net.state_dict()  # keys: slice<k>.<layer>.<weight|bias>
        values = {}
        for key, old in backbone.items():
            value = features.get("features." + key.partition(".")[2])
            if value is None or value.shape != old.shape:
                found = "missing" if value is None else f"of shape {list(value.shape)}, not {list(old.shape)}"
                raise ConfigError(
                    f"evaluate.lpips_backbone {path}: features.{key.partition('.')[2]} is {found}; "
                    f"give torchvision's {self.net} state dict"
                )
            values[key] = value
        self._network.net.load_state_dict(values)

    def identity(self) -> str:
        """The backbone and the hash of its file, for metrics.json."""
        return f"{self.net} {self.sha256}"

    @torch.no_grad()
    def __call__(self, images: Tensor, true_images: Tensor) -> Tensor:
        """Distance of every view; [B]. Pictures smaller than LPIPS_MINIMUM_SIZE are a DataError."""
        return self.distance(images, true_images)

    def distance(self, images: Tensor, true_images: Tensor) -> Tensor:
        """The same, through which gradients flow to the pictures."""
        _check_size("LPIPS", images, LPIPS_MINIMUM_SIZE)
        return self._network(2 * images.float() - 1, 2 * true_images.float() - 1).reshape(len(images))


def _backbone_features(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise many types on a damaged file
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"evaluate.lpips_backbone {path}: not a readable state dict ({reason})") from None
    if not isinstance(state, dict):
        raise ConfigError(f"evaluate.lpips_backbone {path}: holds a {type(state).__name__}, not a state dict")
    return state


def _backbone_kind(path: Path, features: dict[str, Tensor]) -> str:
    first = features.get("features.0.weight")
    shape = tuple(first.shape) if isinstance(first, Tensor) else None
    kinds = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
    if shape not in kinds:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise ConfigError(
            f"evaluate.lpips_backbone {path}: features.0.weight {found}; "
            "give the state dict of torchvision's alexnet or vgg16"
        )
    return kinds[shape]


def _lpips_network(net: str) -> Any:
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # drawn at random, then replaced
        warnings.simplefilter("ignore")  # torchvision's, on the arguments that lpips gives it
        network = lpips.LPIPS(net=net, pnet_rand=True, lpips=True, verbose=False)
    return network.eval().requires_grad_(False)
