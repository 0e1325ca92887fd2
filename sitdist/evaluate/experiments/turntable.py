"""Turntable: cameras on a closed circle, what they see beside what the model renders, and the poses read off it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitdist.evaluate.experiments.common import Tools, row_major, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, TurntableRecord
from sitdist.evaluate.schema import make_records
from sitdist.evaluate.tasks import Task
from sitdist.evaluate.views import to_uint8
from sitdist.geometry.camera import camera_radius, full_turn, orbit
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.io.atomic import write_atomically
from sitdist.io.video import ffmpeg, save_gif, save_mp4
from sitdist.model.codec import psnr

FRAMES = 36
FRAMES_PER_SECOND = 10.0


class Turntable:
    """Cameras at the median radius and elevation of the training cameras; all are rendered from the same noise.

    `rotation_error_deg` is of the pose read off the true picture, which only a scene can give; with `rendered_` it is
    that of the pose read off the model's own picture.
    """

    name = "turntable"
    record = EXPERIMENTS[name].schema

    def __init__(self, tools: Tools, out: Path, plan: dict[str, Any], max_views: int | None) -> None:
        self._tools, self.out = tools, out
        self._frames = min(FRAMES, max_views or FRAMES)
        self.plan = plan | {"experiment": self.name, "frames": self._frames}

    def _task(self, start: int) -> Task:
        stop = min(start + self._tools.settings.batch, self._frames)
        return Task(f"turntable_{start:05d}", tuple(f"t{i:04d}" for i in range(start, stop)), stop - start)

    def tasks(self) -> list[Task]:
        return [self._task(start) for start in range(0, self._frames, self._tools.settings.batch)]

    def cameras(self) -> Tensor:
        """camera_to_world [frames, 4, 4] of the circle."""
        place = self._tools.training_poses[:, :3, 3]
        radius = float(camera_radius(self._tools.training_poses).median())
        elevation = torch.asin(place[:, 2] / torch.linalg.vector_norm(place, dim=-1)).median()
        return orbit(full_turn(self._frames), elevation.rad2deg().cpu(), radius)

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        tools, flow = self._tools, self._tools.loaded.config.flow
        poses = self.cameras()[[int(key[1:]) for key in task.keys]].to(tools.device)
        labels = torch.full((len(poses),), tools.label, dtype=torch.int64, device=tools.device)
        columns: dict[str, Sequence[Any]] = {"key": task.keys, "true": row_major(poses)}
        pictures: dict[str, np.ndarray] = {}
        true = tools.look(poses)
        if true is not None:
            pictures["true"] = to_uint8(true)
            if flow.why_no_pose() is None:
                columns |= _pose_errors(tools.read(tools.encode(true), labels), poses)
        if flow.why_no_picture() is None:
            positions = torch.zeros(len(poses), dtype=torch.int64)
            rendered = tools.render(poses, tools.intrinsics(len(poses)), labels, self.name, positions)
            pictures["rendered"] = to_uint8(rendered)
            if true is not None:
                columns["psnr"] = psnr(rendered, true).tolist()
            if flow.why_no_pose() is None:
                columns |= _pose_errors(tools.read(tools.encode(rendered), labels), poses, "rendered_")
        return make_records(TurntableRecord, columns), pictures

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        result = {"experiment": self.name, "n": len(records), **summaries(records, TurntableRecord)}
        names = [name for name in ("true", "rendered") if all(name in part for part in arrays.values())]
        if names:
            parts = [np.concatenate([arrays[task.name][name] for task in self.tasks()]) for name in names]
            frames = [Image.fromarray(frame) for frame in np.concatenate(parts, axis=2)]
            write_atomically(self.out / "turntable.gif", lambda path: save_gif(frames, path, FRAMES_PER_SECOND))
            result["gif"] = " | ".join(names)
            if ffmpeg():
                out = self.out / "turntable.mp4"
                write_atomically(out, lambda path: save_mp4(frames, path, FRAMES_PER_SECOND, out))
        write_results(self.out, result, records)


def _pose_errors(estimated: Tensor, true: Tensor, prefix: str = "") -> dict[str, list[Any]]:
    return {
        f"{prefix}rotation_error_deg": rotation_error_deg(estimated[:, :3, :3], true[:, :3, :3]).tolist(),
        f"{prefix}translation_error": translation_error(estimated, true).tolist(),
        f"{prefix}estimated": row_major(estimated),
    }
