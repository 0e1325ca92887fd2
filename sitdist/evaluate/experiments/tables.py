"""The experiments' results as tables of text, for the terminal and for the report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sitdist.evaluate.experiments.records import EXPERIMENTS, Experiment
from sitdist.evaluate.schema import AGAIN, Measure, damaged, fault, read_records
from sitdist.io.files import read_json


@dataclass(frozen=True)
class ExperimentTable:
    """An experiment's results: the rows of results.json without what was not measured, and those of records.csv."""

    name: str
    experiment: Experiment
    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def measures(self) -> dict[str, Measure]:
        """What was measured in any row, by name."""
        measures = self.experiment.measures.items()
        return {name: measure for name, measure in measures if any(name in row for row in self.rows)}

    @property
    def heads(self) -> list[str]:
        labels = [label.replace("_", " ") for label in self.experiment.labels]
        return labels + [measure.title for measure in self.measures.values()]

    @property
    def lines(self) -> list[list[str]]:
        """A line of cells for every row."""
        return [
            [str(row[label]) for label in self.experiment.labels] + [self.cell(row, name) for name in self.measures]
            for row in self.rows
        ]

    def cell(self, row: dict[str, Any], name: str) -> str:
        """The mean of a measure as text; empty where it was not measured."""
        return format(mean_of(row[name]), self.measures[name].style) if name in row else ""


def mean_of(value: Any) -> float:
    """The mean of a summary, or a plain number as it is."""
    return float(value["mean"] if isinstance(value, dict) else value)


def load_experiments(folder: Path) -> list[ExperimentTable]:
    """The tables of all experiments that have results in `folder`; DataError for a damaged one."""
    return [_load(folder, name) for name in EXPERIMENTS if (folder / name / "results.json").is_file()]


def _load(folder: Path, name: str) -> ExperimentTable:
    path, experiment = folder / name / "results.json", EXPERIMENTS[name]
    result = read_json(path, AGAIN)
    try:
        rows = [{key: value for key, value in row.items() if value is not None} for row in result.get("rows", [result])]
        if result.get("experiment") != name or not rows:
            raise ValueError(f"not the results of {name}")
        for row in rows:
            experiment.row.model_validate_json(json.dumps(row))
    except ValidationError as error:
        raise damaged(path, fault(error)) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from None
    records = [asdict(record) for record in read_records(folder / name / "records.csv", experiment.schema)]
    ways = Counter(record["key"].rsplit("_", 1)[0] for record in records)
    if name == "interpolation" and len(set(ways.values())) != 1:
        raise damaged(folder / name / "records.csv", "ways of different lengths")
    return ExperimentTable(name, experiment, rows, records)


def format_experiments(folder: Path) -> str:
    """All tables as plain text."""
    blocks = []
    for table in load_experiments(folder):
        lines = [table.heads, *table.lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        blocks.append("\n".join(["", table.experiment.title, *rows, f"files: {folder / table.name}"]) + "\n")
    return "".join(blocks)
