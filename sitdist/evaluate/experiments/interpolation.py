"""Interpolation: what the model renders on the way between two cameras, and how smooth the way is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.transform import Rotation, Slerp
from torch import Tensor

from sitdist.evaluate.experiments.common import Tools, row_major, spread, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, InterpolationRecord
from sitdist.evaluate.schema import make_records
from sitdist.evaluate.tasks import Task
from sitdist.evaluate.views import to_uint8
from sitdist.geometry.camera import look_at
from sitdist.geometry.packing import standardize
from sitdist.geometry.pose import rotation_error_deg
from sitdist.io.arrays import save_arrays
from sitdist.model.codec import psnr

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
