"""The experiments' results as tables of text, for the terminal and for the report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sitdist.evaluate.experiments.records import RECORDS, ROWS
from sitdist.evaluate.schema import damaged, fault, read_table, record_of
from sitdist.io.json_file import read_json

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
ROW_LABELS = ("task", "solver", "function_evaluations", "method", "turn")
POSES = ("true", "estimated", "rendered_estimated")  # columns of records.csv that are lists
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
    """An experiment's results: heads, a line of cells for every row, what they mean, and the parsed results.json.

    `rows`: those of results.json. `records`: the rows of records.csv, None in them where nothing was measured.
    """

    name: str
    title: str
    note: str
    heads: list[str]
    lines: list[list[str]]
    result: dict[str, Any]
    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def labels(self) -> list[str]:
        """What tells one row from another."""
        return [key for key in ROW_LABELS if key in self.rows[0]]

    @property
    def measures(self) -> list[str]:
        return [measure for measure in MEASURES if any(measure in row for row in self.rows)]


def load_experiments(folder: Path) -> list[ExperimentTable]:
    """The tables of all experiments that have results in `folder`; DataError for a damaged one."""
    return [_load(folder / name / "results.json") for name in NAMES if (folder / name / "results.json").is_file()]


def _load(path: Path) -> ExperimentTable:
    name = path.parent.name
    result = read_json(path, "run `sitdist eval` again")
    try:
        rows = [{key: value for key, value in row.items() if value is not None} for row in result.get("rows", [result])]
        if result.get("experiment") != name or not rows:
            raise ValueError(f"not the results of {name}")
        for row in rows:
            ROWS[name].validate_json(json.dumps(row))
    except ValidationError as error:
        raise damaged(path, fault(error)) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from None
    result = {**result, "rows": rows}
    records = _records(path.parent / "records.csv", name)
    table = ExperimentTable(name, TITLES[name], NOTES[name], [], [], result, rows, records)
    heads = [key.replace("_", " ") for key in table.labels] + [MEASURES[each][0] for each in table.measures]
    lines = [
        [str(row[key]) for key in table.labels] + [measure_cell(row, measure) for measure in table.measures]
        for row in rows
    ]
    return replace(table, heads=heads, lines=lines)


def _records(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of records.csv with numbers and poses as such."""
    records = []
    for row in read_table(path):
        try:
            values = {each: json.loads(text) if text and each in POSES else text for each, text in row.items()}
            records.append(asdict(record_of(values, RECORDS[name])))
        except (ValueError, RecursionError) as error:
            raise damaged(path, error) from None
    ways = Counter(record["key"].rsplit("_", 1)[0] for record in records)
    if name == "interpolation" and len(set(ways.values())) != 1:
        raise damaged(path, "ways of different lengths")
    return records


def measure_cell(row: dict[str, Any], measure: str) -> str:
    """The mean of a summary, or a plain number; empty where it was not measured."""
    value, style = row.get(measure), MEASURES[measure][1]
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
