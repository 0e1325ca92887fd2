"""Pictures zoomed about a point, smoothed where they shrink, on a background where nothing is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SUPPORT = 2.0  # half the width of the kernel, in pixels of the coarser of both pictures


def zoomed(picture: Tensor, scale: float, centre: tuple[float, float], background: Tensor) -> Tensor:
    """The same as `resampled` for a picture [3, H, W] in [0, 1], in steps of 1/255."""
    return (resampled(picture, scale, centre, background).clamp(0.0, 1.0) * 255.0).round() / 255.0


def resampled(picture: Tensor, scale: float, centre: tuple[float, float], background: Tensor) -> Tensor:
    """`picture` [C, H, W] enlarged `scale` times about (x, y) = `centre` in pixels.

    What lies outside of it has the values `background` [C]. Pixels are weighted means by Catmull and Rom's cubic
    kernel, stretched where the picture shrinks (Keys 1981; Turkowski 1990).
    """
    height, width = picture.shape[1:]
    colour = background.double()[:, None, None]
    rows, columns = _weights(height, centre[1], scale), _weights(width, centre[0], scale)
    return (colour + rows @ (picture.double() - colour) @ columns.T).float()


def _weights(size: int, centre: float, scale: float) -> Tensor:
    """How much each of `size` pixels counts in each of the zoomed line's, [size, size] float64."""
    place = centre + (torch.arange(size, dtype=torch.float64) + 0.5 - centre) / scale
    return kernel_weights(place, max(1.0, 1.0 / scale), size)


def kernel_weights(place: Tensor, stretch: float, size: int) -> Tensor:
    """How much each of `size` pixels in a line counts at places [n], [n, size] float64, by a kernel `stretch` wide.

    Pixel i covers i to i + 1. A row's weights add up to 1 only with those of pixels outside, which are left out.
    """
    first = math.floor(min(float(place.min()) - SUPPORT * stretch, 0.0))
    last = math.ceil(max(float(place.max()) + SUPPORT * stretch, size))
    pixels = torch.arange(first, last, dtype=torch.float64) + 0.5
    weights = _cubic((place[:, None] - pixels) / stretch)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return weights[:, -first : size - first]


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x.square() + 1.0
    far = ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < SUPPORT, far, torch.zeros_like(x)))
