"""What each experiment says of one view, a row of records.csv, and of many, a row of results.json and of a table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError, create_model, with_config

from sitdist.evaluate.measures import (
    AGAIN,
    STRICT,
    Angle,
    Count,
    Length,
    Measure,
    Number,
    Pose,
    Share,
    Text,
    damaged,
    fault,
    may_be_missing,
    measures_of,
    read_records,
)
from sitdist.evaluate.statistics import Summary
from sitdist.io.files import read_json

Solver = Literal["one_step", "euler", "midpoint", "heun"]
ROTATION = Measure("rotation error", "deg", rotation=True)
TRANSLATION = Measure("translation error", style=".3f")
PSNR = Measure("PSNR", "dB")


@with_config(STRICT)
@dataclass(frozen=True)
class TurntableRecord:
    """One camera of the circle; `rendered_`: read off the model's own picture. None is what was not measured."""

    key: str
    true: Pose
    rotation_error_deg: Annotated[Angle | None, ROTATION] = None
    translation_error: Annotated[Length | None, TRANSLATION] = None
    rendered_rotation_error_deg: Annotated[Angle | None, Measure("rendered: rotation error", "deg", rotation=True)] = (
        None
    )
    rendered_translation_error: Annotated[Length | None, Measure("rendered: translation error", style=".3f")] = None
    psnr: Annotated[Number | None, PSNR] = None
    estimated: Pose | None = None
    rendered_estimated: Pose | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class InterpolationRecord:
    """One step on the way between two cameras."""

    key: str
    method: Literal["slerp", "blend"]
    true: Pose
    psnr_to_last: Annotated[Number | None, Measure("PSNR to last", "dB")] = None
    lpips_to_last: Annotated[Number | None, Measure("LPIPS to last", style=".3f")] = None
    off_the_way_deg: Annotated[Angle | None, Measure("off the way", "deg")] = None


@with_config(STRICT)
@dataclass(frozen=True)
class CycleRecord:
    """One view after one turn."""

    key: str
    turn: Count
    rotation_drift_deg: Annotated[Angle, Measure("rotation drift", "deg", rotation=True)]
    translation_drift: Annotated[Length, Measure("translation drift", style=".3f")]
    rotation_step_deg: Annotated[Angle, Measure("rotation step", "deg", rotation=True)]
    translation_step: Annotated[Length, Measure("translation step", style=".3f")]
    psnr: Annotated[Number, PSNR]
    psnr_to_last: Annotated[Number, Measure("PSNR to last", "dB")]
    estimated: Pose


@with_config(STRICT)
@dataclass(frozen=True)
class SolversRecord:
    """One view by one solver in so many steps."""

    key: str
    task: Literal["pose", "picture"]
    solver: Solver
    steps: Count
    function_evaluations: Count
    ms: Annotated[Length, Measure("ms a view")]
    rotation_error_deg: Annotated[Angle | None, ROTATION] = None
    translation_error: Annotated[Length | None, TRANSLATION] = None
    psnr: Annotated[Number | None, PSNR] = None


@with_config(STRICT)
@dataclass(frozen=True)
class RobustnessRecord:
    """One view under one change; bars and trust are there where the run is calibrated. 1 is true, 0 false."""

    key: str
    change: str
    strength: Number
    rotation_error_deg: Annotated[Angle, ROTATION]
    translation_error: Annotated[Length, TRANSLATION]
    covered: Annotated[Share | None, Measure("within its 90% bar", style=".0%")] = None
    trust: Annotated[Share | None, Measure("trust")] = None
    flagged: Annotated[Share | None, Measure("flagged", style=".0%")] = None
    confidently_wrong: Annotated[Share | None, Measure("confidently wrong", style=".1%")] = None


@dataclass(frozen=True)
class Experiment:
    """How an experiment is declared: its record, what tells its rows apart, and what a reader should know.

    `labels`: fields of the record that all records of a row share. `extra`: measures of a row alone. `whole`: fields of
    the only row, where there are no labels.
    """

    title: str
    note: str
    record: type
    labels: tuple[str, ...] = ()
    extra: tuple[tuple[str, Measure], ...] = ()
    whole: tuple[tuple[str, Any], ...] = ()

    @property
    def schema(self) -> TypeAdapter[Any]:
        """Of the rows of records.csv."""
        return TypeAdapter(self.record)

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures of a row, by name."""
        return measures_of(self.record) | dict(self.extra)

    @property
    def row(self) -> type[BaseModel]:
        """The schema of a row of results.json: labels, and a summary of every measure."""
        hints = get_type_hints(self.record, include_extras=True)
        fields: dict[str, Any] = {name: (kind, None) for name, kind in self.whole}
        fields |= {name: (hints[name], ...) for name in self.labels}
        fields |= {name: (Number, ...) for name, _ in self.extra}
        for name in measures_of(self.record):
            fields[name] = (Summary | None, None) if may_be_missing(self.record, name) else (Summary, ...)
        return create_model("Row", __config__=STRICT, **fields)


EXPERIMENTS = {
    "turntable": Experiment(
        title="Turntable: a closed circle of cameras",
        note="Poses read off the true pictures (where a scene can render them), and off the model's own pictures "
        "(rendered). All pictures are rendered from one noise.",
        record=TurntableRecord,
        whole=(("experiment", Text), ("n", Count), ("gif", Text | None)),
    ),
    "interpolation": Experiment(
        title="Interpolation between two cameras",
        note="PSNR and LPIPS are between neighbouring pictures: how smooth the way is, and its largest jump. Off the "
        "way: rotation between the pose read off a picture and the camera on the sphere's great circle.",
        record=InterpolationRecord,
        labels=("method",),
        extra=(("worst_psnr_to_last", Measure("worst", "dB")),),
    ),
    "cycle": Experiment(
        title="Cycle: pose to view to pose to view",
        note="Drift is from the true pose, step from the pose of the turn before; PSNR against the true view and "
        "against the view of the turn before.",
        record=CycleRecord,
        labels=("turn",),
    ),
    "solvers": Experiment(
        title="Solvers: error and time against function evaluations",
        note="Means over the same views; ms is the time of one view in a batch.",
        record=SolversRecord,
        labels=("task", "solver", "steps", "function_evaluations"),
    ),
    "robustness": Experiment(
        title="Robustness: poses of changed views",
        note="One change at a time, in fixed strengths; angles are in degrees. Flagged: trust below 0.05. Confidently "
        "wrong: trust above 0.2, and more than 10 degrees off.",
        record=RobustnessRecord,
        labels=("change", "strength"),
        extra=(("median_rotation_error_deg", Measure("median", "deg")),),
    ),
}


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
