"""Cycle: pose -> view -> pose -> view, over several turns; how far poses and views drift from where they began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sitdist.evaluate.experiments.common import Tools, row_major, spread, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, CycleRecord
from sitdist.evaluate.schema import make_records
from sitdist.evaluate.tasks import Task
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.model.codec import psnr

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
