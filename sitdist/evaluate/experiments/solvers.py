"""Solvers: the error of poses and pictures, and the time they take, against the number of function evaluations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sitdist.evaluate.experiments.common import Tools, spread, summaries, write_results
from sitdist.evaluate.experiments.records import EXPERIMENTS, SolversRecord
from sitdist.evaluate.measures import make_records
from sitdist.evaluate.tasks import Task
from sitdist.flow.estimate import EstimateOptions
from sitdist.flow.solve import function_evaluations
from sitdist.geometry.pose import rotation_error_deg, translation_error
from sitdist.model.codec import psnr

VIEWS = 16
STEPS = {"euler": (2, 5, 10, 20, 50), "midpoint": (1, 2, 5, 10, 25), "heun": (1, 2, 5, 10, 25)}


class Solvers:
    """Every setting sees the same views, and pictures the same noise; `ms` is the time of a view in a whole batch."""

    name = "solvers"
    record = EXPERIMENTS[name].schema

    def __init__(self, tools: Tools, out: Path, plan: dict[str, Any], max_views: int | None) -> None:
        self._tools, self.out = tools, out
        self._views = spread(tools.references, min(VIEWS, max_views or VIEWS))
        self._warm = False
        flow = tools.loaded.config.flow
        steps = [(solver, count) for solver, counts in STEPS.items() for count in counts]
        reads, renders = flow.why_no_pose() is None, flow.why_no_picture() is None
        self._settings = [("pose", "one_step", 1)] if reads else []
        self._settings += [("pose", *each) for each in steps] if reads and renders else []  # a regressor knows t = 1
        self._settings += [("picture", *each) for each in steps] if renders else []
        self.plan = plan | {"experiment": self.name, "views": len(self._views), "of": len(self._settings)}

    def tasks(self) -> list[Task]:
        tasks = []
        for of, solver, steps in self._settings:
            name = f"{of}_{solver}_{steps:03d}"
            keys = tuple(f"{name}_{view.key}" for view in self._views)
            tasks.append(Task(name, keys, len(self._views), _evaluations(solver, steps)))
        return tasks

    def measure(self, task: Task) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        tools = self._tools
        of, solver, steps = next(each for each in self._settings if task.name == f"{each[0]}_{each[1]}_{each[2]:03d}")
        batch, count = tools.load(self._views), len(self._views)
        true, latents, labels = batch.camera_to_world, batch.latents, batch.labels
        self._warm_up(latents, labels)
        columns: dict[str, Sequence[Any]] = {
            "key": task.keys,
            "task": [of] * count,
            "solver": [solver] * count,
            "steps": [steps] * count,
            "function_evaluations": [_evaluations(solver, steps)] * count,
        }
        begun = _now(tools.device)
        if of == "pose":
            read = tools.read(latents, labels, EstimateOptions(solver, steps))
            spent = _now(tools.device) - begun
            columns["rotation_error_deg"] = rotation_error_deg(read[:, :3, :3], true[:, :3, :3]).tolist()
            columns["translation_error"] = translation_error(read, true).tolist()
        else:
            positions = torch.tensor([view.position for view in self._views])
            changes = {"generator": solver, "generator_steps": steps}
            rendered = tools.render(true, batch.intrinsics, labels, "eval", positions, **changes)
            spent = _now(tools.device) - begun
            columns["psnr"] = psnr(rendered, batch.images).tolist()
        columns["ms"] = [1000.0 * spent / count] * count
        return make_records(SolversRecord, columns), {}

    def _warm_up(self, latents: Tensor, labels: Tensor) -> None:
        """The first evaluation of a process is slow, so it is not one that is timed."""
        if not self._warm:
            loaded = self._tools.loaded
            pose = torch.zeros(len(latents), 4, 4, device=latents.device)
            model = loaded.endpoint.conditioned(loaded.model, pose)
            with torch.no_grad():
                model(latents, torch.full((len(latents),), 0.5, device=latents.device), labels)
            self._warm = True

    def finish(self, records: list[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]) -> None:
        rows = []
        for setting in self._settings:
            inside = [record for record in records if (record["task"], record["solver"], record["steps"]) == setting]
            labels = {name: inside[0][name] for name in EXPERIMENTS[self.name].labels}
            rows.append(labels | summaries(inside, SolversRecord))
        write_results(self.out, {"experiment": self.name, "n": len(self._views), "rows": rows}, records)


def _evaluations(solver: str, steps: int) -> int:
    return 1 if solver == "one_step" else function_evaluations(solver, steps)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
