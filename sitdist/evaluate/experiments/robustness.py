"""Robustness: poses read off views that are changed as the world changes them, in graded strengths.

Every change leaves the pose as it is, or moves the camera and the true pose with it. Nothing here is drawn as in
training: the changes are fixed, one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from sitdist.dataset.appearance import moved, on_background
from sitdist.evaluate.experiments.common import Tools, spread, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, RobustnessRecord
from sitdist.evaluate.measures import make_records
from sitdist.evaluate.tasks import Task
from sitdist.flow import draws
from sitdist.geometry.pose import rotation_error_deg, rotation_from_vector, translation_error
from sitdist.inference.calibration import FLAGGED

VIEWS = 128
TRUSTED = 0.2  # an answer with more trust is confident
FAR_OFF = 10.0  # degrees

# ------------------------------------------------------------------------------------------------------- the changes


def _gamma(pictures: Tensor, gamma: float) -> Tensor:
    return pictures.pow(gamma)


def _brightness(pictures: Tensor, gain: float) -> Tensor:
    return pictures * gain


def _warmth(pictures: Tensor, warmth: float) -> Tensor:
    """Red up and blue down by this share."""
    return pictures * pictures.new_tensor([1.0 + warmth, 1.0, 1.0 - warmth])[:, None, None]


def _contrast(pictures: Tensor, contrast: float) -> Tensor:
    return 0.5 + contrast * (pictures - 0.5)


def _noise(pictures: Tensor, deviation: float) -> Tensor:
    size = pictures[0].numel()
    noise = draws.normal(0, "robustness", torch.arange(len(pictures)), size).reshape(pictures.shape)
    return pictures + deviation * noise.to(pictures.device)


def _blur(pictures: Tensor, deviation: float) -> Tensor:
    """By a Gaussian of this deviation in pixels of a picture of 64 x 64."""
    deviation *= pictures.shape[-1] / 64.0
    radius = math.ceil(3.0 * deviation)
    line = (-0.5 * (torch.arange(-radius, radius + 1, device=pictures.device) / deviation).square()).exp()
    line = (line / line.sum()).repeat(3, 1, 1, 1)
    padded = F.pad(pictures, [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, line, groups=3), line.mT, groups=3)


def _jpeg(pictures: Tensor, quality: float) -> Tensor:
    pixels = (255.0 * pictures.clamp(0.0, 1.0)).round().to(torch.uint8).cpu()
    decoded = torch.stack([decode_jpeg(encode_jpeg(each, int(quality))) for each in pixels])
    return decoded.to(pictures) / 255.0


def _occlude(pictures: Tensor, share: float) -> Tensor:
    """Hide a square of this share of the picture's middle quarter, where the object is, by a colour of its own."""
    size = pictures.shape[-1]
    side = round(0.5 * size * math.sqrt(share))
    uniforms = draws.uniform(0, "robustness occluders", torch.arange(len(pictures)), 5).to(pictures)
    hidden = pictures.clone()
    for row, numbers in enumerate(uniforms):
        left, top = (round(0.25 * size + float(number) * (0.5 * size - side)) for number in numbers[:2])
        hidden[row, :, top : top + side, left : left + side] = numbers[2:, None, None]
    return hidden


def _plain(views: Tensor, value: float) -> Tensor:
    return on_background(views, torch.full_like(views[:, :1], value))


def _coloured(views: Tensor, _: float) -> Tensor:
    colours = draws.uniform(0, "robustness colours", torch.arange(len(views)), 3).to(views)
    return on_background(views, colours[:, :, None, None])


def _textured(views: Tensor, contrast: float) -> Tensor:
    coarse = draws.uniform(0, "robustness textures", torch.arange(len(views)), 3 * 36).to(views).reshape(-1, 3, 6, 6)
    texture = F.interpolate(coarse, views.shape[-1], mode="bicubic").clamp(0.0, 1.0)
    return on_background(views, 0.5 + contrast * (texture - 0.5))


def _cut_out(views: Tensor, threshold: float) -> Tensor:
    """Cut out of a picture on black by a hard mask of this opacity, and put on grey: what a photo editor leaves."""
    mask = (1.0 - views[:, 3:] > threshold).float()
    return mask * on_background(views, torch.zeros_like(views[:, :1])) + 0.5 * (1.0 - mask)


PICTURE_CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "brightness": (_brightness, (0.6, 0.8, 1.2, 1.4)),
    "gamma": (_gamma, (0.5, 0.7, 1.4, 2.0)),
    "contrast": (_contrast, (0.7, 1.3)),
    "warmth": (_warmth, (0.1, 0.2)),
    "noise": (_noise, (0.02, 0.05, 0.1)),
    "blur": (_blur, (0.5, 1.0, 2.0)),
    "JPEG quality": (_jpeg, (90, 50, 20)),
    "occluder": (_occlude, (0.1, 0.2, 0.4)),
}
VIEW_CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "grey background": (_plain, (0.0, 0.4, 1.0)),
    "coloured background": (_coloured, (1.0,)),
    "textured background": (_textured, (0.3, 1.0)),
    "cut out of black": (_cut_out, (0.2, 0.5, 0.8)),
}
CAMERA_CHANGES: dict[str, tuple[float, ...]] = {"roll": (2.0, 5.0, 15.0), "turn": (1.0, 2.0), "zoom": (0.9, 1.1)}


# ------------------------------------------------------------------------------------------------------ the experiment


class Robustness:
    """Reads the poses of the same views under every change, with error bars and trust where the run is calibrated.

    Backgrounds and mattes, and cameras that move, need views without their background: a scene, or a dataset that
    keeps its views.
    """

    name = "robustness"
    record = EXPERIMENTS[name].schema

    def __init__(self, tools: Tools, out: Path, plan: dict[str, Any], max_views: int | None) -> None:
        self._tools, self.out = tools, out
        self._views = spread(tools.references, min(VIEWS, max_views or VIEWS))
        self._changes: list[tuple[str, float]] = [("none", 0.0)]
        self._changes += [(name, value) for name, (_, values) in PICTURE_CHANGES.items() for value in values]
        if tools.views.keeps_transparency:
            self._changes += [(name, value) for name, (_, values) in VIEW_CHANGES.items() for value in values]
            self._changes += [(name, value) for name, values in CAMERA_CHANGES.items() for value in values]
        self.plan = plan | {"experiment": self.name, "views": len(self._views), "changes": len(self._changes)}

    def tasks(self) -> list[Task]:
        names = [f"change_{number:03d}" for number in range(len(self._changes))]
        return [Task(name, tuple(f"{name}_{view.key}" for view in self._views), len(self._views)) for name in names]

    @cached_property
    def _batch(self) -> Any:
        return self._tools.load(self._views)

    @cached_property
    def _transparent(self) -> Tensor:
        """The views without their background, [B, 4, H, W]."""
        parts = [self._tools.views.transparent((view,)) for view in self._views]
        return torch.cat(parts).to(self._tools.device)

    @torch.no_grad()
    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        change, strength = self._changes[int(task.name.removeprefix("change_"))]
        batch, tools = self._batch, self._tools
        pictures, true = self._changed(change, strength)
        latents = tools.encode(pictures.clamp(0.0, 1.0).float())
        estimate = tools.estimate(latents, batch.labels)
        rotation = rotation_error_deg(estimate.camera_to_world[:, :3, :3], true[:, :3, :3])
        columns: dict[str, Any] = {
            "key": task.keys,
            "change": [change] * len(self._views),
            "strength": [strength] * len(self._views),
            "rotation_error_deg": rotation.tolist(),
            "translation_error": translation_error(estimate.camera_to_world, true).tolist(),
        }
        if estimate.trust is not None and estimate.rotation_bars_deg is not None:
            flagged, confident = estimate.trust < FLAGGED, estimate.trust > TRUSTED
            columns["covered"] = (rotation <= estimate.rotation_bars_deg[:, 1]).double().tolist()
            columns["trust"] = estimate.trust.tolist()
            columns["flagged"] = flagged.double().tolist()
            columns["confidently_wrong"] = (confident & (rotation > FAR_OFF)).double().tolist()
        return make_records(RobustnessRecord, columns), {}

    def _changed(self, change: str, strength: float) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] under a change, and their true poses [B, 4, 4]."""
        batch = self._batch
        if change in PICTURE_CHANGES:
            return PICTURE_CHANGES[change][0](batch.images, strength), batch.camera_to_world
        if change in VIEW_CHANGES:
            return VIEW_CHANGES[change][0](self._transparent, strength), batch.camera_to_world
        if change not in CAMERA_CHANGES:
            return batch.images, batch.camera_to_world
        count, true = len(batch.images), batch.camera_to_world.clone()
        angle = 0.0 if change == "zoom" else math.radians(strength)
        vector = [0.0, 0.0, angle] if change == "roll" else [0.6 * angle, 0.8 * angle, 0.0]
        rotation = rotation_from_vector(true.new_tensor(vector)).expand(count, 3, 3)
        zoom = true.new_full((count,), strength if change == "zoom" else 1.0)
        true[:, :3, :3] = true[:, :3, :3] @ rotation
        seen = moved(self._transparent, rotation, zoom, batch.intrinsics)
        background = self._tools.views.background()
        assert background is not None
        return on_background(seen, background.to(seen)[:, None, None]), true

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        rows = []
        for change, strength in self._changes:
            inside = [each for each in records if (each["change"], each["strength"]) == (change, strength)]
            median = float(np.median([each["rotation_error_deg"] for each in inside]))
            row = {"change": change, "strength": strength, "median_rotation_error_deg": median}
            rows.append(row | summaries(inside, RobustnessRecord))
        write_results(self.out, {"experiment": self.name, "n": len(self._views), "rows": rows}, records)
