"""Where the object is in a photo: from its alpha, a folder of masks, the colour of a backdrop, or a trained remover."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from sitdist.errors import DataError, shortened
from sitdist.io.images import SUFFIXES, to_pixels

KEY_TOLERANCE = 0.1
EDGE = 2.5  # pixels from what is opaque: the width of an edge


@dataclass(frozen=True)
class Matting:
    """How photos get their opacity, beside the alpha that they have.

    `masks`: a folder with a mask for each photo, of its name or stem, white where the object is. `key`: the colour of
    the backdrop; pixels within `tolerance` of it in every channel are background. `remove`: ask
    rembg's network.
    """

    masks: Path | None = None
    key: tuple[float, float, float] | None = None
    tolerance: float = KEY_TOLERANCE
    remove: bool = False

    def read(self, picture: Path) -> tuple[Tensor, Tensor | None]:
        """Light [3, H, W], colour times opacity, and opacity [H, W] of a photo; None: it is opaque. DataError."""
        colour, opacity = to_pixels(picture, str(picture))
        if opacity is not None and bool((opacity == 1.0).all()):
            opacity = None  # an alpha channel that tells nothing
        if self.masks is not None:
            opacity = _product(opacity, self._mask(picture, colour.shape[-2:]))
        if self.remove:
            pixels = (colour.permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy()
            found = np.asarray(self._remover(Image.fromarray(pixels)).convert("L"))
            opacity = _product(opacity, torch.from_numpy(found / np.float32(255.0)))
        if self.key is None:
            return (colour if opacity is None else colour * opacity), opacity
        colour, keyed = without_backdrop(colour, torch.tensor(self.key), self.tolerance)
        opacity = _product(opacity, keyed)
        return colour * opacity, opacity

    def _mask(self, picture: Path, shape: tuple[int, ...]) -> Tensor:
        """The mask [H, W] of a photo: a file of its name, of its name and .png as COLMAP has it, or of its stem."""
        assert self.masks is not None
        names = [picture.name, f"{picture.name}.png", *(f"{picture.stem}{suffix}" for suffix in SUFFIXES)]
        file = next((self.masks / name for name in names if (self.masks / name).is_file()), None)
        if file is None:
            raise DataError(
                f"{self.masks}: no mask for {picture.name}; add {picture.stem}.png, white where the object is"
            )
        colour, opacity = to_pixels(file, str(file))
        if colour.shape[-2:] != shape:
            raise DataError(
                f"{file}: {colour.shape[2]}x{colour.shape[1]} pixels but its photo has {shape[1]}x{shape[0]}; make "
                "masks of the size of the photos"
            )
        return colour.amax(dim=0) if opacity is None else colour.amax(dim=0) * opacity

    @cached_property
    def _remover(self) -> Any:
        try:
            import rembg
        except ImportError:
            raise DataError(
                "--remove-background: needs rembg; pip install 'rembg[cpu]', or give --masks or --key"
            ) from None
        try:
            session = rembg.new_session()
        except Exception as error:  # no network, a full disk, another version of its runtime
            reason = shortened(" ".join(str(error).split()))
            raise DataError(f"--remove-background: rembg does not start ({reason}); give --masks or --key") from None
        return lambda picture: rembg.remove(picture, session=session, only_mask=True)


def _product(opacity: Tensor | None, other: Tensor) -> Tensor:
    return other if opacity is None else opacity * other


def without_backdrop(colour: Tensor, backdrop: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Colour [3, H, W] and opacity [H, W] of what stands before a backdrop [3].

    A pixel at an edge has the colour of the nearest pixel inside, and the opacity that mixes both to what is seen.
    """
    behind = backdrop[:, None, None]
    opacity = (((colour - behind).abs().amax(dim=0) - tolerance) / max(tolerance, 1e-3)).clamp(0.0, 1.0)
    inside = ndimage.binary_erosion(opacity.numpy() == 1.0, np.ones((3, 3)))
    if not inside.any():
        return colour, opacity
    distance, (row, column) = ndimage.distance_transform_edt(~inside, return_indices=True)
    at_edge = torch.from_numpy((distance > 0) & (distance < EDGE)) & (opacity > 0.0)
    within = colour[:, torch.from_numpy(row), torch.from_numpy(column)]  # [3, H, W]
    contrast = (within - behind).square().sum(0).clamp_min(1e-6)
    share = (((colour - behind) * (within - behind)).sum(0) / contrast).clamp(0.0, 1.0)
    return torch.where(at_edge, within, colour), torch.where(at_edge, opacity.minimum(share), opacity)
