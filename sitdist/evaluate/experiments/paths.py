"""Cameras one after another: a turntable, the way between two cameras, and cycles of pose and view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from sitdist.evaluate.experiments.common import Tools, row_major, spread, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, CycleRecord, InterpolationRecord, TurntableRecord
from sitdist.evaluate.measures import make_records
from sitdist.evaluate.tasks import Task
from sitdist.evaluate.views import to_uint8
from sitdist.geometry.camera import camera_radius, full_turn, look_at, orbit
from sitdist.geometry.packing import standardize
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.io.arrays import save_arrays
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


PAIRS, STEPS = 8, 9


class Interpolation:
    """`slerp` moves the camera on the sphere and renders from one noise; `blend` mixes two noisy endpoints linearly.

    Smoothness is PSNR (and LPIPS, with a backbone) between neighbouring pictures. `off_the_way_deg`: the rotation
    between the pose read off a picture and the camera of slerp's way.
    """

    name = "interpolation"
    record = EXPERIMENTS[name].schema

    def __init__(self, tools: Tools, out: Path, plan: dict[str, Any], max_views: int | None) -> None:
        self._tools, self.out = tools, out
        self.methods = ("slerp", "blend") if tools.loaded.endpoint.kind == "pose" else ("slerp",)
        most = PAIRS if max_views is None else max(1, max_views // (STEPS * len(self.methods)))
        self._pairs = max(1, min(PAIRS, most, len(tools.references) // 2))
        self.plan = plan | {"experiment": self.name, "pairs": self._pairs, "steps": STEPS}

    def tasks(self) -> list[Task]:
        return [
            Task(name, tuple(f"{name}_{step:02d}" for step in range(STEPS)), STEPS)
            for pair in range(self._pairs)
            for name in (f"pair{pair:03d}_{method}" for method in self.methods)
        ]

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        tools = self._tools
        pair, method = int(task.name[4:7]), task.name[8:]
        chosen = spread(tools.references, 2 * self._pairs)
        ends = tuple(chosen[i] for i in (pair, pair + self._pairs))
        views = [tools.views.load((end,)) for end in ends]
        poses = torch.cat([view.camera_to_world for view in views])
        labels = views[0].labels.to(tools.device).expand(STEPS)
        intrinsics = views[0].intrinsics.to(tools.device).expand(STEPS, 4)
        way = between(poses[0], poses[1], STEPS).to(tools.device)
        if method == "slerp":
            positions = torch.full((STEPS,), ends[0].position)
            pictures = tools.render(way, intrinsics, labels, self.name, positions)
        else:
            noise = tools.noise(self.name, torch.tensor([end.position for end in ends]))
            packed = standardize(poses.to(tools.device), tools.loaded.statistics, intrinsics[:2])
            start, stop = tools.loaded.endpoint.x0(packed, noise)
            share = torch.linspace(0.0, 1.0, STEPS, device=tools.device)[:, None, None, None]
            pictures = tools.follow((1.0 - share) * start + share * stop, labels)  # [STEPS, 3, H, W]
        records = self._records(task, method, pictures, labels, way)
        return records, {"rendered": to_uint8(pictures)}

    def _records(self, task: Task, method: str, pictures: Tensor, labels: Tensor, way: Tensor) -> list[dict[str, Any]]:
        tools = self._tools
        columns: dict[str, Sequence[Any]] = {
            "key": task.keys,
            "method": [method] * STEPS,
            "true": row_major(way),
            "psnr_to_last": [None, *psnr(pictures[1:], pictures[:-1]).tolist()],
        }
        if tools.lpips is not None:
            columns["lpips_to_last"] = [None, *tools.lpips(pictures[1:], pictures[:-1]).tolist()]
        if tools.loaded.config.flow.why_no_pose() is None:
            read = tools.read(tools.encode(pictures), labels)
            columns["off_the_way_deg"] = rotation_error_deg(read[:, :3, :3], way[:, :3, :3]).tolist()
        return make_records(InterpolationRecord, columns)

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        rows = []
        for method in self.methods:
            inside = [record for record in records if record["method"] == method]
            ends = [record["psnr_to_last"] for record in inside if record["psnr_to_last"] is not None]
            rows.append({"method": method, "worst_psnr_to_last": min(ends), **summaries(inside, InterpolationRecord)})
        result = {"experiment": self.name, "pairs": self._pairs, "steps": STEPS, "rows": rows}
        write_results(self.out, result, records)
        strips = {task.name: np.concatenate(list(arrays[task.name]["rendered"]), axis=1) for task in self.tasks()}
        save_arrays(self.out / "strips.npz", strips)


def between(start: Tensor, stop: Tensor, steps: int) -> Tensor:
    """Cameras [steps, 4, 4] on the way from one [4, 4] to the other: SLERP of the direction from the origin, the radius
    linear; upright towards the origin where both ends are, else with the rotation on its own great circle.
    """
    ends = torch.stack([start, stop]).to(torch.float64)
    share = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)[:, None]
    place = ends[:, :3, 3]
    radius = torch.linalg.vector_norm(place, dim=-1)
    first, last = place / radius[:, None]
    angle = torch.acos((first @ last).clamp(-1.0, 1.0))
    if angle < 1e-6:
        direction = first.expand(steps, 3)
    else:
        aside = last - (first @ last) * first
        if torch.linalg.vector_norm(aside) < 1e-6:  # opposite: any great circle, over the pole if it can be
            other = torch.tensor([0.0, 0.0, 1.0] if abs(float(first[2])) < 0.9 else [1.0, 0.0, 0.0], dtype=first.dtype)
            aside = other - (other @ first) * first
        aside = aside / torch.linalg.vector_norm(aside)
        direction = (share * angle).cos() * first + (share * angle).sin() * aside
    path = ((1.0 - share) * radius[0] + share * radius[1]) * direction
    way = look_at(path)
    if torch.allclose(way[[0, -1]], ends, atol=1e-4):
        return way
    rotations = Slerp([0.0, 1.0], Rotation.from_matrix(ends[:, :3, :3].numpy()))(share[:, 0].numpy())
    way[:, :3, :3] = torch.from_numpy(rotations.as_matrix())
    return way


VIEWS, TURNS = 32, 4


class Cycle:
    """In every turn a view is rendered from the last pose, with new noise, and a pose is read off that view.

    Drift is from the true pose, step from the pose before; PSNR is against the true view and against the last one.
    """

    name = "cycle"
    record = EXPERIMENTS[name].schema

    def __init__(self, tools: Tools, out: Path, plan: dict[str, Any], max_views: int | None) -> None:
        self._tools, self.out = tools, out
        self._views = spread(tools.references, min(VIEWS, max_views or VIEWS))
        self._batch = max(1, min(tools.settings.batch, 16))
        self.plan = plan | {"experiment": self.name, "views": len(self._views), "turns": TURNS}

    def tasks(self) -> list[Task]:
        chunks = range(0, len(self._views), self._batch)
        return [
            Task(
                f"cycle_{start:05d}",
                tuple(f"{view.key}_turn{turn}" for view in self._chunk(start) for turn in range(1, TURNS + 1)),
                TURNS * len(self._chunk(start)),
            )
            for start in chunks
        ]

    def _chunk(self, start: int) -> list[Any]:
        return self._views[start : start + self._batch]

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        tools, views = self._tools, self._chunk(int(task.name[6:]))
        batch = tools.load(views)
        true, positions = batch.camera_to_world, torch.tensor([view.position for view in views])
        records: list[dict[str, Any]] = []
        poses, before = true, batch.images
        for turn in range(1, TURNS + 1):
            rendered = tools.render(poses, batch.intrinsics, batch.labels, f"cycle turn {turn}", positions)
            read = tools.read(tools.encode(rendered), batch.labels)
            columns: dict[str, list[Any]] = {
                "key": [f"{view.key}_turn{turn}" for view in views],
                "turn": [turn] * len(views),
                "rotation_drift_deg": rotation_error_deg(read[:, :3, :3], true[:, :3, :3]).tolist(),
                "translation_drift": translation_error(read, true).tolist(),
                "rotation_step_deg": rotation_error_deg(read[:, :3, :3], poses[:, :3, :3]).tolist(),
                "translation_step": translation_error(read, poses).tolist(),
                "psnr": psnr(rendered, batch.images).tolist(),
                "psnr_to_last": psnr(rendered, before).tolist(),
                "estimated": row_major(read),
            }
            records += make_records(CycleRecord, columns)
            poses, before = read, rendered
        return records, {}

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        rows = [
            {"turn": turn, **summaries([record for record in records if record["turn"] == turn], CycleRecord)}
            for turn in range(1, TURNS + 1)
        ]
        write_results(self.out, {"experiment": self.name, "n": len(self._views), "rows": rows}, records)
