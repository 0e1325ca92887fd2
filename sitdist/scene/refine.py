"""Refine the camera of a picture by rendering and comparing: damped Gauss-Newton on all six degrees of freedom.

The renderer is the scene's own radiance field, fitted from training views alone. When the camera moves, a pixel moves
as the depth of what it shows tells, so one rendering gives all derivatives (direct image alignment: Lucas and Kanade
1981; Engel et al., "Direct sparse odometry", 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sitdist.geometry.camera import Intrinsics, camera_rays
from sitdist.geometry.least_squares import levenberg_marquardt
from sitdist.geometry.pose import rotation_from_vector
from sitdist.scene.volume import Rendered

Look = Callable[[Tensor, Intrinsics], Rendered]


class Stage(NamedTuple):
    """At most `steps` Gauss-Newton steps on pictures of about `pixels` a side."""

    pixels: int
    steps: int


COARSE_TO_FINE = (Stage(16, 10), Stage(32, 8), Stage(64, 20))
LARGEST_STEP = 0.3  # in radians, and in the logarithm of the distance
SMALLEST_STEP = 3e-4  # below it a picture is done
DIFFERENCE = 1e-4  # of parameters, over which the motion of points is measured
OUTLIER = 0.15  # difference of colours in [0, 1] beyond which a pixel hardly counts
GAIN_PRIOR, OFFSET_PRIOR = 0.02, 0.5  # weights of gain 1 and offset 0, relative to all of the object's pixels
STANDS_OUT = 0.1  # how much an object's pixel differs from a plain background
# Where else to begin: turns about the object around the camera's x, y and z axes (radians), and the logarithm of the
# distance's factor.
OTHER_STARTS = (
    *((0.0, 0.25, 0.0, 0.0), (0.0, -0.25, 0.0, 0.0), (0.25, 0.0, 0.0, 0.0), (-0.25, 0.0, 0.0, 0.0)),
    *((0.0, 0.0, 0.3, 0.0), (0.0, 0.0, -0.3, 0.0), (0.0, 0.0, 0.0, 0.2), (0.0, 0.0, 0.0, -0.2)),
)


@dataclass(frozen=True)
class Refined:
    """camera_to_world [B, 4, 4] float64, zoom [B] (factor on the focal length), and how good they are.

    error [B]: root mean square difference over the object's pixels. settled [B]: no step moves the camera on.
    rotation_std_deg, position_std [B]: standard errors, as if pixels erred independently.
    """

    camera_to_world: Tensor
    zoom: Tensor
    error: Tensor
    settled: Tensor
    rotation_std_deg: Tensor
    position_std: Tensor


@torch.no_grad()
def refine_cameras(
    look: Look,
    images: Tensor,
    camera_to_world: Tensor,
    intrinsics: Sequence[Intrinsics],
    backgrounds: Sequence[Tensor | None],
    enough: float,
    focal: bool = False,
    centre: Tensor | None = None,
    stages: Sequence[Stage] = COARSE_TO_FINE,
) -> Refined:
    """Cameras near `camera_to_world` [B, 4, 4] that `look` sees as `images` [B, 3, H, W] show it.

    backgrounds: the plain colour [3] behind each object; None: it is not plain, and what surrounds the object in the
    picture is continued behind it. Gain and offset of each colour are fitted along, and pixels that differ much, as
    those of an occluder do, hardly count. Pictures whose error stays above `enough` are tried again from OTHER_STARTS.
    focal: the focal length is free as well. centre [3]: of the object, by default the origin.
    """
    found = []
    for row, image in enumerate(images):
        alignment = _Alignment(look, image, intrinsics[row], backgrounds[row], focal, centre)
        found.append(alignment.refined(camera_to_world[row].double(), stages, enough))
    return Refined(*(torch.stack(column) for column in zip(*(vars(each).values() for each in found), strict=True)))


def moved_camera(camera_to_world: Tensor, parameters: Tensor, centre: Tensor | None = None) -> Tensor:
    """A camera [4, 4] float64 moved by parameters [6 or more].

    Turns about `centre` (the origin) around the camera's x, y and z axes, in radians; the logarithm of the factor on
    its distance; turns about the camera's own centre around its x and y axes. At a few dozen pixels, a small turn and a
    sideways shift nearly cancel; these six are nearly independent of each other.
    """
    centre = camera_to_world.new_zeros(3) if centre is None else centre.to(camera_to_world)
    rotation, position = camera_to_world[:3, :3], camera_to_world[:3, 3]
    turned = rotation @ rotation_from_vector(parameters[:3])
    moved = camera_to_world.clone()
    moved[:3, :3] = turned @ rotation_from_vector(F.pad(parameters[4:6], (0, 1)))
    moved[:3, 3] = centre + parameters[3].exp() * (turned @ rotation.T @ (position - centre))
    return moved


class _Compared(NamedTuple):
    """A rendering beside the picture: robust differences [P], and what their derivatives need."""

    error: Tensor
    slope: Tensor  # [3, H, W], of the robust difference by the rendered picture
    rendered: Tensor  # [3, H, W]
    fine: Tensor  # [3, h, w], the same with a pixel for every ray
    through: Tensor  # [H, W]
    depth: Tensor  # [h, w]


class _Alignment:
    """One picture [3, H, W], and the scene."""

    def __init__(
        self,
        look: Look,
        image: Tensor,
        intrinsics: Intrinsics,
        background: Tensor | None,
        focal: bool,
        centre: Tensor | None,
    ) -> None:
        self._look, self._image, self._intrinsics, self._centre = look, image.float(), intrinsics, centre
        self._is_plain = background is not None
        self._background = self._image if background is None else background.to(image)[:, None, None].expand_as(image)
        self._count = 7 if focal else 6
        self._last: tuple[object, _Compared] | None = None

    def refined(self, camera: Tensor, stages: Sequence[Stage], enough: float) -> Refined:
        """The best of all starts."""
        here = camera.new_zeros(self._count)
        best, settled = self._fitted(camera, here, stages)
        error = self._object_error(camera, best)
        for offset in OTHER_STARTS:
            if error <= enough:
                break
            start = best.clone()
            start[:4] += start.new_tensor(offset)
            tried, there = self._fitted(camera, start, stages)
            reached = self._object_error(camera, tried)
            if reached < error:
                best, settled, error = tried, there, reached
        moved, zoom = moved_camera(camera, best, self._centre), self._zoom(best)
        here[6:] = best[6:]
        rotation_std, position_std = self._standard_errors(moved, here)
        number = camera.new_tensor
        return Refined(moved, number(zoom), number(error), settled, rotation_std.rad2deg(), position_std)

    def _fitted(self, camera: Tensor, parameters: Tensor, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
        """Parameters [6 or 7] from `parameters` on, and whether no step moves them on."""
        settled = torch.zeros(1, dtype=torch.bool)
        for stage in stages:
            if not self._is_plain:
                self._background, self._last = self._inpainted(camera, parameters), None
            shrink = max(1, min(self._image.shape[-2:]) // stage.pixels)
            found, settled = levenberg_marquardt(
                parameters[None],
                lambda now, _, shrink=shrink: self._compare(camera, now[0], shrink).error[None],  # type: ignore[misc]
                lambda now, _, shrink=shrink: self._jacobian(camera, now[0], shrink)[None],  # type: ignore[misc]
                stage.steps,
                LARGEST_STEP,
                SMALLEST_STEP,
            )
            parameters = found[0]
        return parameters, settled[0]

    def _zoom(self, parameters: Tensor) -> float:
        return float(parameters[6].exp()) if len(parameters) > 6 else 1.0

    def _camera(self, camera: Tensor, parameters: Tensor, shrink: int) -> tuple[Tensor, Intrinsics]:
        """The moved camera, with a pixel for every ray."""
        zoom, seen = self._zoom(parameters), self._intrinsics.shrunk(shrink).scaled(_rays(shrink))
        return moved_camera(camera, parameters, self._centre), replace(seen, fx=seen.fx * zoom, fy=seen.fy * zoom)

    def _compare(self, camera: Tensor, parameters: Tensor, shrink: int) -> _Compared:
        """The picture beside the rendering, shrunk; the last answer is kept."""
        key = (shrink, *camera.flatten().tolist(), *parameters.tolist())
        if self._last is None or self._last[0] != key:
            self._last = key, self._compare_anew(camera, parameters, shrink)
        return self._last[1]

    def _compare_anew(self, camera: Tensor, parameters: Tensor, shrink: int) -> _Compared:
        fine = self._look(*self._camera(camera, parameters, shrink))
        fine_light = fine.light.permute(2, 0, 1)
        light, through = F.avg_pool2d(fine_light, _rays(shrink)), F.avg_pool2d(fine.through[None], _rays(shrink))[0]
        target, background = F.avg_pool2d(self._image, shrink), F.avg_pool2d(self._background, shrink)
        gain, offset = _photometric(light, 1.0 - through, target - through * background)
        rendered = gain * light + offset * (1.0 - through) + through * background
        behind = F.interpolate(background[None], fine.through.shape)[0]
        fine_rendered = gain * fine_light + offset * (1.0 - fine.through) + fine.through * behind
        difference = rendered - target
        outlying = 1.0 + (difference / OUTLIER).square()
        error = difference * outlying.rsqrt()  # Geman and McClure 1987: it saturates at OUTLIER
        depth = _filled(fine.depth, 1.0 - fine.through)
        return _Compared(error.flatten().double(), outlying**-1.5, rendered, fine_rendered, through, depth)

    def _jacobian(self, camera: Tensor, parameters: Tensor, shrink: int) -> Tensor:
        """Derivatives [P, 6 or 7] of the errors: minus the slope of the picture along each pixel's motion."""
        compared = self._compare(camera, parameters, shrink)
        padded = F.pad(compared.fine[None], [1, 1, 1, 1], mode="replicate")[0]
        slope_x = 0.5 * (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2])
        slope_y = 0.5 * (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1])
        origins, directions = camera_rays(*self._camera(camera, parameters, shrink))
        points = origins + compared.depth[..., None] * directions  # [h, w, 3]
        columns = []
        for direction in DIFFERENCE * torch.eye(len(parameters), dtype=torch.float64):
            ahead, behind = (
                _project(points, *self._camera(camera, parameters + sign * direction.to(camera), shrink))
                for sign in (1.0, -1.0)
            )
            motion = ((ahead - behind) / (2.0 * DIFFERENCE)).float()  # pixels, [h, w, 2]
            change = -(slope_x * motion[..., 0] + slope_y * motion[..., 1])  # [3, h, w]
            columns.append((compared.slope * F.avg_pool2d(change, _rays(shrink))).flatten())
        return torch.stack(columns, dim=-1).double()

    def _inpainted(self, camera: Tensor, parameters: Tensor) -> Tensor:
        """The picture [3, H, W]; where the scene shows the object now, what surrounds it."""
        through = F.avg_pool2d(self._look(*self._camera(camera, parameters, 1)).through[None], _rays(1))[None]
        outside = 1.0 - F.max_pool2d((through < 0.95).float(), 5, stride=1, padding=2)  # [1, 1, H, W]
        planes = torch.cat([self._image[None] * outside, outside], dim=1)  # colour times weight, and weight
        reach = 3
        while not planes[:, 3:].all() and reach < 2 * max(self._image.shape):
            near = F.avg_pool2d(planes, reach, stride=1, padding=reach // 2)
            planes = torch.where(planes[:, 3:] > 0, planes, near / near[:, 3:].clamp_min(1e-6))
            reach = 2 * reach + 1
        return planes[0, :3]

    def _object_error(self, camera: Tensor, parameters: Tensor) -> float:
        """Root mean square difference over the object: where it is rendered, or stands out of a plain background."""
        compared = self._compare(camera, parameters, 1)
        object_ = compared.through < 0.5
        if self._is_plain:
            object_ |= (self._image - self._background).abs().amax(0) > STANDS_OUT
        squared = (compared.rendered - self._image).square().mean(0)
        return float(squared[object_].mean().sqrt()) if object_.any() else 1.0

    def _standard_errors(self, camera: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """Standard errors of rotation (radians) and position, by the errors and slopes at the solution."""
        slopes, error = self._jacobian(camera, here, 1), self._compare(camera, here, 1).error
        used = int((slopes.abs().amax(1) > 1e-6).sum())
        information = slopes.T @ slopes + 1e-9 * torch.eye(len(here)).to(slopes)
        covariance = error.square().sum() / max(1, used - len(here)) * torch.linalg.inv(information)
        moves = []
        for direction in DIFFERENCE * torch.eye(len(here)).to(camera):
            ahead, behind = (moved_camera(camera, sign * direction, self._centre) for sign in (1.0, -1.0))
            turn = 0.5 * (ahead[:3, :3].T @ behind[:3, :3] - behind[:3, :3].T @ ahead[:3, :3])
            vector = torch.stack([turn[1, 2], turn[2, 0], turn[0, 1]])
            moves.append(torch.cat([vector, ahead[:3, 3] - behind[:3, 3]]) / (2.0 * DIFFERENCE))
        transform = torch.stack(moves, dim=1)  # [6, 6 or 7]
        variance = (transform @ covariance @ transform.T).diagonal()
        return variance[:3].sum().sqrt(), variance[3:].sum().sqrt()


def _rays(shrink: int) -> int:
    """Number of rays along the side of a pixel of a picture that is shrunk so."""
    return max(2, min(shrink, 4))


def _photometric(light: Tensor, opacity: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset [3, 1, 1] with which light [3, H, W] of some opacity [H, W] is nearest to `seen` [3, H, W].

    Least squares over the object, outliers left out in a second round.
    """
    weight = opacity.square().expand_as(light)
    for _ in range(2):
        total = weight.sum((-2, -1)) + 1e-6
        by_light = (weight * light.square()).sum((-2, -1)) + GAIN_PRIOR * total
        by_opacity = (weight * opacity.square()).sum((-2, -1)) + OFFSET_PRIOR * total
        mixed = (weight * light * opacity).sum((-2, -1))
        on_light = (weight * light * seen).sum((-2, -1)) + GAIN_PRIOR * total
        on_opacity = (weight * opacity * seen).sum((-2, -1))
        determinant = by_light * by_opacity - mixed.square()
        gain = ((by_opacity * on_light - mixed * on_opacity) / determinant).clamp(0.3, 3.0)[:, None, None]
        offset = ((by_light * on_opacity - mixed * on_light) / determinant).clamp(-0.3, 0.3)[:, None, None]
        difference = gain * light + offset * opacity - seen
        weight = opacity.square() / (1.0 + (difference / OUTLIER).square()).square()
    return gain, offset


def _project(points: Tensor, camera: Tensor, intrinsics: Intrinsics) -> Tensor:
    """Pixels (x, y) [..., 2] of points [..., 3]."""
    local = (points - camera[:3, 3]) @ camera[:3, :3]
    ahead = (-local[..., 2]).clamp_min(1e-6)
    x = intrinsics.cx + intrinsics.fx * local[..., 0] / ahead
    y = intrinsics.cy - intrinsics.fy * local[..., 1] / ahead
    return torch.stack([x, y], dim=-1)


def _filled(depth: Tensor, opacity: Tensor) -> Tensor:
    """Depth [H, W] of the object, of its depth times opacity; beside it that of the nearest pixels."""
    planes = torch.stack([depth, opacity])[None]
    for _ in range(2):
        near = F.avg_pool2d(planes, 3, stride=1, padding=1)
        planes = torch.where(planes[:, 1:] > 0.05, planes, near)
    mean = depth.sum() / opacity.sum().clamp_min(1e-6)
    return torch.where(planes[0, 1] > 1e-3, planes[0, 0] / planes[0, 1].clamp_min(1e-3), mean.clamp_min(1e-3))
