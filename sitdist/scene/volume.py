"""Volume rendering: colour along a ray is what every stretch emits times what the stretches before it let through.

One compositing rule serves solids, whose stretches are known in closed form, and any other field, by marching.
Source: Max, "Optical models for direct volume rendering", 1995; the quadrature of Mildenhall et al., "NeRF", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sitdist.geometry.camera import Intrinsics, camera_rays
from sitdist.scene.field import Solids, chair

Field = Callable[[Tensor], tuple[Tensor, Tensor]]
BACKGROUND = (0.5, 0.5, 0.5)


def composite(optical_depth: Tensor, colour: Tensor, background: Tensor) -> Tensor:
    """Colours [R, 3] of rays with stretches in order: optical depth [R, K], colour [R, K, 3], on `background` [3]."""
    through = torch.exp(-optical_depth.cumsum(-1))  # [R, K], what is left behind each stretch
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    weight = before - through
    return (weight[..., None] * colour).sum(-2) + through[:, -1:] * background


def march(field: Field, origins: Tensor, directions: Tensor, near: float, far: float, samples: int) -> Tensor:
    """Colours [R, 3] of rays [R, 3] through any field, by `samples` equal stretches, each as at its middle."""
    step = (far - near) / samples
    distance = near + step * (torch.arange(samples, dtype=origins.dtype) + 0.5)
    points = origins[:, None] + distance[:, None] * directions[:, None]  # [R, S, 3]
    density, colour = field(points.reshape(-1, 3))
    shape = points.shape[:2]
    return composite(density.reshape(shape) * step, colour.reshape(*shape, 3), origins.new_tensor(BACKGROUND))


def render_solids(solids: Solids, origins: Tensor, directions: Tensor) -> Tensor:
    """Colours [R, 3] of rays [R, 3] through disjoint homogeneous solids: exact absorption, colour as at the entry."""
    enter, leave = solids.intervals(origins, directions)  # [R, K]
    colour = solids.texture(origins[:, None] + enter[..., None] * directions[:, None])
    order = enter.argsort(dim=-1, stable=True)
    optical_depth = (solids.density * (leave - enter)).gather(1, order)
    colour = colour.gather(1, order[..., None].expand_as(colour))
    return composite(optical_depth, colour, origins.new_tensor(BACKGROUND))


def render_views(camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 2) -> Tensor:
    """Pictures [N, 3, H, W] of the built-in object, float32 in steps of 1/255, from cameras [N, 4, 4].

    Every pixel is the mean of supersample^2 rays. Each view is rendered by itself, so that it does not depend on the
    views beside it.
    """
    solids = chair()
    fine = Intrinsics(
        fx=supersample * intrinsics.fx,
        fy=supersample * intrinsics.fy,
        cx=supersample * intrinsics.cx,
        cy=supersample * intrinsics.cy,
        width=supersample * intrinsics.width,
        height=supersample * intrinsics.height,
    )
    pictures = []
    for pose in camera_to_world:
        origins, directions = camera_rays(pose, fine)
        colour = render_solids(solids, origins.reshape(-1, 3).float(), directions.reshape(-1, 3).float())
        picture = colour.reshape(fine.height, fine.width, 3).permute(2, 0, 1)[None]
        picture = torch.nn.functional.avg_pool2d(picture, supersample)[0]
        pictures.append((picture * 255.0).round() / 255.0)
    return torch.stack(pictures)
