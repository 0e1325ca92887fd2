"""The experiments' results as tables of text, for the terminal and for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitdist.errors import DataError

NAMES = ("turntable", "interpolation", "cycle", "solvers")
TITLES = {
    "turntable": "Turntable: a closed circle of cameras",
    "interpolation": "Interpolation between two cameras",
    "cycle": "Cycle: pose to view to pose to view",
    "solvers": "Solvers: error and time against function evaluations",
}
NOTES = {
    "turntable": "Poses read off the true pictures (where a scene can render them), and off the model's own pictures "
    "(rendered). All pictures are rendered from one noise.",
    "interpolation": "PSNR and LPIPS are between neighbouring pictures: how smooth the way is, and its largest jump. "
    "Off the way: rotation between the pose read off a picture and the camera on the sphere's great circle.",
    "cycle": "Drift is from the true pose, step from the pose of the turn before; PSNR against the true view and "
    "against the view of the turn before.",
    "solvers": "Means over the same views; ms is the time of one view in a batch.",
}
MEASURES = {  # how they are written
    "rotation_error_deg": ("rotation error (deg)", ".2f"),
    "translation_error": ("translation error", ".3f"),
    "rendered_rotation_error_deg": ("rendered: rotation error (deg)", ".2f"),
    "rendered_translation_error": ("rendered: translation error", ".3f"),
    "rotation_drift_deg": ("rotation drift (deg)", ".2f"),
    "translation_drift": ("translation drift", ".3f"),
    "rotation_step_deg": ("rotation step (deg)", ".2f"),
    "translation_step": ("translation step", ".3f"),
    "psnr": ("PSNR (dB)", ".2f"),
    "psnr_to_last": ("PSNR to last (dB)", ".2f"),
    "worst_psnr_to_last": ("worst (dB)", ".2f"),
    "lpips_to_last": ("LPIPS to last", ".3f"),
    "off_the_way_deg": ("off the way (deg)", ".2f"),
    "ms": ("ms a view", ".2f"),
}


@dataclass(frozen=True)
class ExperimentTable:
    """An experiment's results: heads, a line of cells for every row, what they mean, and the parsed results.json."""

    name: str
    title: str
    note: str
    heads: list[str]
    lines: list[list[str]]
    result: dict[str, Any]


def load_experiments(folder: Path) -> list[ExperimentTable]:
    """The tables of all experiments that have results in `folder`; DataError for a damaged one."""
    return [_load(folder / name / "results.json") for name in NAMES if (folder / name / "results.json").is_file()]


def _load(path: Path) -> ExperimentTable:
    try:
        result = json.loads(path.read_text())
        name, rows = result["experiment"], result.get("rows", [result])
        labels = [key for key in ("task", "solver", "function_evaluations", "method", "turn") if key in rows[0]]
        measures = [measure for measure in MEASURES if any(measure in row for row in rows)]
        lines = [
            [str(row[key]) for key in labels] + [_cell(row.get(measure), MEASURES[measure][1]) for measure in measures]
            for row in rows
        ]
        heads = [key.replace("_", " ") for key in labels] + [MEASURES[measure][0] for measure in measures]
        return ExperimentTable(name, TITLES[name], NOTES[name], heads, lines, result)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); run `sitdist eval` again") from None


def _cell(value: Any, style: str) -> str:
    """The mean of a summary, or a plain number."""
    return "" if value is None else format(value["mean"] if isinstance(value, dict) else value, style)


def format_experiments(folder: Path) -> str:
    """All tables as plain text."""
    blocks = []
    for table in load_experiments(folder):
        widths = [max(map(len, column)) for column in zip(table.heads, *table.lines, strict=True)]
        rows = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in (table.heads, *table.lines)
        ]
        blocks.append("\n".join(["", table.title, *rows, f"files: {folder / table.name}"]) + "\n")
    return "".join(blocks)
