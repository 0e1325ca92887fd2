"""How a view may look: backgrounds, mattes, light, lens, noise and compression vary, the pose does not.

A view is stored without its background, as light (colour times opacity) and transmittance. Every appearance is a pure
function of (seed, global position), so it is drawn anew at every visit and is the same for any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from sitdist.config.experiment import AppearanceConfig
from sitdist.errors import ConfigError
from sitdist.flow import draws
from sitdist.geometry.pose import rotation_from_vector
from sitdist.io.images import open_picture, to_pixels

OWN, BLACK, WHITE, PLAIN = 0.15, 0.30, 0.40, 0.65  # cumulative shares of the backgrounds; the rest is textured
NUMBERS = 64  # uniform numbers per appearance
RESAMPLINGS = (("nearest", 0.75), ("bilinear", 0.75), ("bilinear", 0.5), ("bicubic", 0.6))  # modes and scales
KERNEL = 3  # radius of blur kernels in pixels
LARGEST_FOLDER = 2000  # pictures that are kept as backgrounds


def on_background(views: Tensor, background: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] of views [B, 4, H, W] (light and transmittance) on backgrounds [B, 3, 1 or H, 1 or W]."""
    return views[:, :3] + views[:, 3:] * background


class Appearance:
    """Draws appearances of views of `size` x `size` pixels.

    `backgrounds`: the colour behind each object, by label; where it is unknown, a plain colour is drawn instead.
    Each view has a strength of its own, uniform up to `config.strength`, which scales all that is done to it: with 0 it
    stays clean.
    """

    def __init__(
        self, config: AppearanceConfig, seed: int, size: int, backgrounds: Mapping[int, tuple[float, float, float]]
    ) -> None:
        self._strength, self._seed, self._size = config.strength, seed, size
        self._own = torch.full((1 + max(backgrounds, default=0), 3), math.nan)
        for label, colour in backgrounds.items():
            self._own[label] = torch.tensor(colour)
        self._pictures = None if config.pictures is None else load_backgrounds(Path(config.pictures), 2 * size)
        y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2.0 - 1.0] * 2, indexing="ij")
        self._grid = torch.stack([x, y])  # [2, H, W] in [-1, 1]

    @torch.no_grad()
    def __call__(self, views: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] of views [B, 4, H, W] uint8 at global positions [B]."""
        device = views.device
        uniforms = draws.uniform(self._seed, "appearance", positions, NUMBERS).to(torch.float32)
        strength = self._strength * uniforms[:, -1]  # of each view: some stay nearly clean
        numbers = _Numbers(uniforms, strength)
        views = views.float() / 255.0
        background = self._background(labels, positions, numbers)
        picture = self._cut_out(views, background, numbers)
        picture = self._occlude(picture, positions, numbers)
        picture = self._light(picture, numbers)
        picture = _resample(picture, numbers)
        picture = _blur(picture, numbers)
        picture = self._noise(picture, positions, numbers).clamp(0.0, 1.0)
        return _compress(picture, numbers).to(device)

    def _background(self, labels: Tensor, positions: Tensor, numbers: _Numbers) -> Tensor:
        """Backgrounds [B, 3, H, W], some with a shadow."""
        kind, plain = numbers.uniform(), numbers.colour()
        own = self._own.to(labels.device)[labels.clamp(max=len(self._own) - 1)]
        own = torch.where(own.isnan(), plain, own)
        # At strength s, a share 1 - s of the views keep their own background.
        kind = torch.where(numbers.chance(1.0), kind, torch.zeros_like(kind))[:, None]
        colour = torch.where(kind < WHITE, torch.ones_like(plain), plain)
        colour = torch.where(kind < BLACK, torch.zeros_like(plain), colour)
        colour = torch.where(kind < OWN, own, colour)
        background = colour[:, :, None, None].repeat(1, 1, self._size, self._size)
        textured = (kind[:, 0] >= PLAIN).nonzero()[:, 0]
        from_folder, place = numbers.uniform() < 0.5, [numbers.uniform() for _ in range(4)]
        if len(textured):
            background[textured] = self._texture(positions[textured])
        if self._pictures is not None:
            for row in (from_folder & (kind[:, 0] >= PLAIN)).nonzero()[:, 0].tolist():
                picture = self._pictures[int(place[0][row] * len(self._pictures))]
                left, top = (int(place[n][row] * (self._size + 1)) for n in (1, 2))
                crop = picture[:, top : top + self._size, left : left + self._size].float() / 255.0
                background[row] = crop.flip(-1) if place[3][row] < 0.5 else crop
        return background

    def _texture(self, positions: Tensor) -> Tensor:
        """Smooth random textures [B, 3, H, W]: noise of three scales between two colours, and rectangles."""
        noise = draws.normal(self._seed, "texture", positions, 3 * (2 + 9 + 49 + 256)).to(positions.device)
        coarse, middle, fine = (
            part.reshape(-1, 3, round((part.shape[1] / 3) ** 0.5), round((part.shape[1] / 3) ** 0.5))
            for part in noise[:, 6:].split([27, 147, 768], dim=1)
        )
        mean, contrast = noise[:, 0:3, None, None], noise[:, 3:6, None, None].abs()
        field = torch.zeros(len(noise), 3, self._size, self._size, device=noise.device)
        for weight, part in ((0.25, coarse), (0.15, middle), (0.08, fine)):
            field += weight * F.interpolate(part, self._size, mode="bilinear", align_corners=True)
        texture = 0.5 + 0.2 * mean + (0.3 + contrast) * field
        corners = draws.uniform(self._seed, "rectangles", positions, 4 * 7).reshape(-1, 4, 7, 1, 1).float()
        x, y = self._grid.to(positions.device)
        for rectangle in corners.unbind(1):
            centre, half = 2.0 * rectangle[:, 0:2] - 1.0, 0.1 + 0.5 * rectangle[:, 2:4]
            inside = ((x - centre[:, 0]).abs() < half[:, 0]) & ((y - centre[:, 1]).abs() < half[:, 1])
            texture = torch.where(inside[:, None], 0.5 * texture + 0.5 * rectangle[:, 4:7], texture)
        return texture.clamp(0.0, 1.0)

    def _cut_out(self, views: Tensor, background: Tensor, numbers: _Numbers) -> Tensor:
        """The views before their backgrounds, some with a shadow, some cut out of another picture by a hard mask.

        A mask with another threshold than half the opacity erodes or dilates the object; what it keeps of the picture
        that it was cut out of is a fringe.
        """
        opacity = 1.0 - views[:, 3:]
        offset = torch.stack([numbers.between(-0.4, 0.4), numbers.between(-0.4, 0.4)], dim=-1)  # [B, 2]
        shade = torch.where(numbers.chance(0.25), numbers.between(0.2, 0.7), torch.zeros_like(offset[:, 0]))
        rows = shade.nonzero()[:, 0]
        if len(rows):
            affine = torch.eye(2, 3, device=views.device).repeat(len(rows), 1, 1)
            affine[:, :, 2] = offset[rows]
            small = F.avg_pool2d(opacity[rows], 4) if self._size % 4 == 0 else opacity[rows]
            grid = F.affine_grid(affine, [len(rows), 1, self._size, self._size], align_corners=False)
            shadow = F.grid_sample(small, grid, padding_mode="zeros", align_corners=False)
            background[rows] *= 1.0 - shade[rows, None, None, None] * shadow
        picture = on_background(views, background)
        cut, threshold, soft = numbers.chance(0.35), numbers.uniform(), numbers.uniform() < 0.5
        wide, kind, colour = numbers.uniform(), numbers.uniform(), numbers.colour()
        rows = cut.nonzero()[:, 0]
        if len(rows):
            kind, colour = kind[rows, None], colour[rows]
            colour = torch.where(kind < 0.7, torch.ones_like(colour), colour)
            colour = torch.where(kind < 0.45, torch.zeros_like(colour), colour)
            before = on_background(views[rows], colour[:, :, None, None])
            mask = (opacity[rows] > 0.02 + 0.96 * threshold[rows, None, None, None]).float()
            mask = torch.where(wide[rows, None, None, None] < 0.2, F.max_pool2d(mask, 3, 1, 1), mask)
            mask = torch.where(soft[rows, None, None, None], F.avg_pool2d(mask, 3, 1, 1), mask)
            picture[rows] = mask * before + (1.0 - mask) * background[rows]
        return picture

    def _occlude(self, picture: Tensor, positions: Tensor, numbers: _Numbers) -> Tensor:
        """Put an ellipse or a rectangle of one colour, or of a texture, before some of the pictures."""
        hidden, colour, textured = numbers.chance(0.15), numbers.colour(), numbers.uniform() < 0.4
        centre = torch.stack([numbers.between(-0.7, 0.7), numbers.between(-0.7, 0.7)], dim=-1)
        axes = torch.stack([numbers.between(0.08, 0.4), numbers.between(0.08, 0.4)], dim=-1)
        angle, power = numbers.between(0.0, math.pi), numbers.uniform() < 0.5
        rows = hidden.nonzero()[:, 0]
        if len(rows):
            place = self._grid.to(picture.device) - centre[rows, :, None, None]
            cos, sin = angle[rows, None, None].cos(), angle[rows, None, None].sin()
            u = (cos * place[:, 0] + sin * place[:, 1]) / axes[rows, 0, None, None]
            v = (cos * place[:, 1] - sin * place[:, 0]) / axes[rows, 1, None, None]
            radius = torch.where(power[rows, None, None], u.square() + v.square(), u.abs().maximum(v.abs()))
            before = colour[rows, :, None, None].expand(-1, -1, self._size, self._size).clone()
            few = textured[rows].nonzero()[:, 0]
            if len(few):
                before[few] = self._texture(positions[rows[few]] + (1 << 40))
            picture[rows] = torch.where(radius[:, None] < 1.0, before, picture[rows])
        return picture

    def _light(self, picture: Tensor, numbers: _Numbers) -> Tensor:
        """Exposure, white balance, contrast, vignetting, then gamma."""
        one = torch.ones_like(picture[:, 0, 0, 0])
        gain = torch.where(numbers.chance(0.8), numbers.around(0.3), one)
        tint = torch.stack([numbers.around(0.08) for _ in range(3)], dim=-1)
        contrast = torch.where(numbers.chance(0.3), numbers.around(0.25), one)
        vignette = torch.where(numbers.chance(0.3), numbers.amount(0.4), 0.0 * one)
        gamma = torch.where(numbers.chance(0.8), numbers.factor(1.57), one)
        radius = 0.5 * self._grid.to(picture.device).square().sum(0)  # [H, W], 1 in the corners
        factor = (gain * contrast)[:, None] * tint  # [B, 3]
        picture = picture * factor[:, :, None, None] + (0.5 * (1.0 - contrast))[:, None, None, None]
        picture = picture * (1.0 - vignette[:, None, None] * radius)[:, None]
        rows = (gamma != 1.0).nonzero()[:, 0]
        picture[rows] = picture[rows].clamp(0.0, 1.0).pow(gamma[rows, None, None, None])
        return picture

    def _noise(self, picture: Tensor, positions: Tensor, numbers: _Numbers) -> Tensor:
        noisy, deviation = numbers.chance(0.5), numbers.amount(0.06)
        generator = torch.Generator()  # on the CPU: the same numbers for every device
        seeds = (2.0**53 * draws.uniform(self._seed, "noise of a picture", positions, 1)).long()
        for row in noisy.nonzero()[:, 0].tolist():
            generator.manual_seed(int(seeds[row]))
            noise = torch.randn(3, self._size, self._size, generator=generator)
            picture[row].add_(noise.to(picture.device), alpha=float(deviation[row]))
        return picture


class _Numbers:
    """Hands out uniform numbers, one [B] at a time, in always the same order.

    The `strength` of each view [B] scales its probabilities and its amounts.
    """

    def __init__(self, uniforms: Tensor, strength: Tensor) -> None:
        self._columns: Iterator[Tensor] = iter(uniforms.unbind(1))
        self._share, self._strength = strength.clamp(max=1.0), strength

    def uniform(self) -> Tensor:
        """Uniform in (0, 1), [B]."""
        return next(self._columns)

    def chance(self, probability: float) -> Tensor:
        """True with this probability, [B] bool."""
        return self.uniform() < probability * self._share

    def between(self, low: float, high: float) -> Tensor:
        """Uniform between two numbers that the strength does not change."""
        return low + (high - low) * self.uniform()

    def amount(self, most: float) -> Tensor:
        """Uniform from 0 to `most`."""
        return most * self._strength * self.uniform()

    def around(self, most: float) -> Tensor:
        """Uniform from 1 - most to 1 + most, and never below 0.05."""
        return (1.0 + most * self._strength * (2.0 * self.uniform() - 1.0)).clamp_min(0.05)

    def factor(self, most: float) -> Tensor:
        """From 1 / most to most, uniform in its logarithm."""
        return ((2.0 * self.uniform() - 1.0) * self._strength * math.log(most)).exp()

    def colour(self) -> Tensor:
        """Uniform colours, [B, 3]."""
        return torch.stack([self.uniform() for _ in range(3)], dim=-1)


def _resample(picture: Tensor, numbers: _Numbers) -> Tensor:
    """Make some pictures smaller and larger again, by four filters."""
    resampled, kind = numbers.chance(0.2), numbers.uniform()
    size = picture.shape[-1]
    for number, (mode, scale) in enumerate(RESAMPLINGS):
        rows = (resampled & ((kind * 4).long() == number)).nonzero()[:, 0]
        if len(rows):
            antialias = mode != "nearest"
            small = F.interpolate(picture[rows], max(1, round(scale * size)), mode=mode, antialias=antialias)
            picture[rows] = F.interpolate(small, size, mode="bilinear")
    return picture


def _blur(picture: Tensor, numbers: _Numbers) -> Tensor:
    """Blur half of the pictures: by a Gaussian of up to 1.1 pixels, or by the disc of a lens out of focus."""
    blurred, radius, disc = numbers.chance(0.5), numbers.amount(1.1), numbers.uniform() < 0.3
    rows = blurred.nonzero()[:, 0]
    if len(rows):
        pictures, deviation = picture[rows], radius[rows].clamp_min(1e-3)
        offsets = torch.arange(-KERNEL, KERNEL + 1, device=picture.device, dtype=torch.float32)
        squared = offsets.square() + offsets.square()[:, None]  # [7, 7]
        gaussian = (-0.5 * squared / deviation[:, None, None].square()).exp()
        edge = (2.0 * deviation[:, None, None] + 0.5 - squared.sqrt()).clamp(0.0, 1.0)  # 2 sigma: the same deviation
        kernel = torch.where(disc[rows, None, None], edge, gaussian)
        kernel = kernel / kernel.sum((-2, -1), keepdim=True)
        padded = F.pad(pictures, [KERNEL] * 4, mode="replicate").flatten(0, 1)[None]  # [1, 3n, H + 6, W + 6]
        kernel = kernel.repeat_interleave(3, dim=0)[:, None]
        picture[rows] = F.conv2d(padded, kernel, groups=len(kernel)).reshape(pictures.shape)
    return picture


def _compress(picture: Tensor, numbers: _Numbers) -> Tensor:
    """Pass a third of the pictures through JPEG of quality 30 to 95; the stronger, the lower."""
    compressed, loss = numbers.chance(0.3), numbers.amount(65.0)
    for row in compressed.nonzero()[:, 0].tolist():
        pixels = (255.0 * picture[row]).round().to(torch.uint8).cpu()
        decoded = decode_jpeg(encode_jpeg(pixels, max(5, round(95.0 - float(loss[row])))))
        picture[row] = decoded.to(picture) / 255.0
    return picture


def load_backgrounds(folder: Path, size: int) -> Tensor:
    """The pictures of a folder, cropped to squares of `size` pixels, [N, 3, size, size] uint8; ConfigError if none."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    pictures = []
    for path in files[:LARGEST_FOLDER]:
        colour = to_pixels(open_picture(path, str(path)).convert("RGB"), str(path))[0]
        side = min(colour.shape[1:])
        top, left = ((length - side) // 2 for length in colour.shape[1:])
        square = colour[None, :, top : top + side, left : left + side]
        small = F.interpolate(square, size, mode="bilinear", antialias=True)[0].clamp(0.0, 1.0)
        pictures.append((255.0 * small).round().to(torch.uint8))
    if not pictures:
        raise ConfigError(f"appearance.pictures {folder}: no pictures there; give a folder of JPEG or PNG files")
    return torch.stack(pictures)


def moved(views: Tensor, rotation: Tensor, zoom: Tensor, intrinsics: Tensor) -> Tensor:
    """Views [B, 4, H, W] float32 as their cameras see them after turning by `rotation` [B, 3, 3] and zooming.

    A camera that turns about its centre sees the same rays elsewhere (a homography), so this is exact but for what
    enters the picture: nothing is known there, and it is background. `rotation` turns the camera in its own frame:
    camera_to_world[:3, :3] @ rotation is the new one. `zoom` [B] multiplies the focal length; `intrinsics` [B, 4] are
    the normalized ones before it.
    """
    size = views.shape[-1]
    fx, fy, cx, cy = intrinsics.float()[:, :, None, None].unbind(1)  # [B, 1, 1]
    at = (torch.arange(size, device=views.device) + 0.5) / size
    y, x = torch.meshgrid(at, at, indexing="ij")
    zoom = zoom.float()[:, None, None]
    ray = torch.stack(torch.broadcast_tensors((x - cx) / (fx * zoom), (cy - y) / (fy * zoom), -torch.ones_like(x)), -1)
    ray = ray @ rotation.float().mT[:, None]  # [B, H, W, 3] in the old camera's frame
    depth = -ray[..., 2]
    place = torch.stack([cx + fx * ray[..., 0] / depth, cy - fy * ray[..., 1] / depth], dim=-1)
    empty = views.new_tensor([0.0, 0.0, 0.0, 1.0])[:, None, None]
    return F.grid_sample(views - empty, 2.0 * place - 1.0, mode="bicubic", align_corners=False) + empty


def draw_moves(config: AppearanceConfig, seed: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Random rotations [B, 3, 3] float64 of cameras in their own frames, and zooms [B], for `moved`."""
    uniforms = 2.0 * draws.uniform(seed, "camera moves", positions, 4) - 1.0
    shift, roll = math.radians(config.turn_deg), math.radians(config.roll_deg)
    rotation = rotation_from_vector(uniforms[:, :3] * uniforms.new_tensor([shift, shift, roll]))
    return rotation, (uniforms[:, 3] * math.log(config.zoom)).exp()
