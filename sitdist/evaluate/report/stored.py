"""What an evaluation leaves, read and checked: metrics.json, records.csv and images.npz."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sitdist.evaluate.baselines import NoiseFloor
from sitdist.evaluate.experiments.records import ExperimentTable, load_experiments
from sitdist.evaluate.measures import (
    AGAIN,
    BINS_AT_MOST,
    MEASURES,
    RECORD,
    Count,
    Length,
    Number,
    Share,
    Text,
    ViewRecord,
    damaged,
    fault,
    may_be_missing,
    measures_of,
    read_records,
)
from sitdist.evaluate.statistics import Summary
from sitdist.io.arrays import load_arrays
from sitdist.io.files import read_json

ALWAYS_MEASURED = [name for name in measures_of(ViewRecord) if not may_be_missing(ViewRecord, name)]
PICTURES = ("key", "bin", "true", "rendered")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Row(_Checked):
    """One row of the table: the views with a radius in `radius`, and a summary of every measure over exactly these.

    Summaries of what only earlier versions measured may be there and are left out.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Summary | None]

    name: Text
    radius: tuple[Count, Count]
    n: Count

    @model_validator(mode="after")
    def _complete(self) -> Row:
        for name in MEASURES:
            summary = self.get(name)
            if summary is None and name in ALWAYS_MEASURED:
                raise ValueError(f"{name} is missing")
            shares = [each for each in MEASURES[name].main if each.startswith("share")]
            if summary is not None and any(getattr(summary, share) is None for share in shares):
                raise ValueError(f"{name} has no {shares[0]}")
        return self

    def get(self, name: str) -> Summary | None:
        """The summary of a measure; None where it was not measured."""
        return self.__pydantic_extra__.get(name)

    @property
    def is_bin(self) -> bool:
        """Whether it is a unit bin, and not a range of them."""
        return self.radius[1] - self.radius[0] == 1

    def summaries(self) -> dict[str, Summary]:
        """What was measured, by name."""
        found = {name: self.get(name) for name in MEASURES}
        return {name: summary for name, summary in found.items() if summary is not None}


class TrainingCounts(_Checked):
    """How many training views there are, and how many were compared with."""

    count: Count
    compared: Count


class Shares(_Checked):
    """How often error bars of the levels of a calibration held, over n views."""

    observed: list[Share]
    standard_error: list[Share]
    n: Count


class BarShares(Shares):
    """The same over all views, and over the quarter with the largest bars."""

    largest_quarter: Shares


class FittedOn(_Checked):
    """The views that a calibration was fitted on."""

    dataset: Text
    split: Text
    views: Count


class CalibrationSummary(_Checked):
    """What `sitdist.inference.calibration.coverage_summary` says, as far as the report shows it."""

    fitted_on: FittedOn
    expected: list[Share]
    rotation: BarShares
    translation: BarShares

    @model_validator(mode="after")
    def _complete(self) -> CalibrationSummary:
        for bars in (self.rotation, self.translation):
            for each in (bars, bars.largest_quarter):
                if not len(each.observed) == len(each.standard_error) == len(self.expected) > 0:
                    raise ValueError("as many levels are expected as observed")
        return self


class Metrics(_Checked):
    """metrics.json. `lpips` is the backbone's identity, or why there is none.

    There are no rows where only experiments beside the radii were measured; then function_evaluations is None.
    `no_pose` and `no_picture`: why the model reads no poses or renders no pictures, None if it does.
    `radius_augmented`: how many training views were zoomed copies of others.
    """

    run: Text
    step: Count
    dataset: Text
    split: Text
    estimator: Text
    function_evaluations: Count | None
    readout: Text = "svd"
    refine: Text | None = None
    not_converged: Count = 0
    generator: Text
    generator_steps: Count
    guidance: Number | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    sigma: Number
    noise_floor: NoiseFloor | None
    no_pose: Text | None = None
    no_picture: Text | None = None
    lpips: Text
    training_radius: tuple[Length, Length]
    radius_augmented: Count = 0
    training_views: TrainingCounts
    versions: dict[Text, Text]
    provenance: dict[Text, Text] = Field(default={})
    config: dict[str, Any] = Field(default={})
    background: tuple[Share, Share, Share] | None = None
    calibration: CalibrationSummary | None = None
    rows: list[Row]
    labels: list[Row] = Field(default=[])

    @property
    def bins(self) -> list[Row]:
        """The rows of unit bins, which hold every view once."""
        return [row for row in self.rows if row.is_bin]

    @property
    def floors(self) -> dict[str, float]:
        """The packing's noise floor, by the metric that it is a floor of."""
        floor = self.noise_floor
        if floor is None or self.no_pose:
            return {}
        return {"rotation_error_deg": floor.rotation_deg, "translation_error": floor.translation}

    def measured(self, field: str) -> bool:
        """Whether there are rows and every one has this measure."""
        return bool(self.rows) and all(row.get(field) is not None for row in self.rows)

    @model_validator(mode="after")
    def _complete(self) -> Metrics:
        if not self.rows:
            return self
        if self.function_evaluations is None:
            raise ValueError("function_evaluations is missing")
        for name, measure in MEASURES.items():
            reason = self.no_pose if measure.of == "pose" else self.no_picture
            if measure.plotted and self.measured(name) == bool(reason):
                raise ValueError(f"{name} is {'there' if reason else 'missing'}")
        return self


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation left: no records and no pictures where only experiments beside the radii were measured.

    `pictures`: key [N], bin [N], true and, where anything is rendered, rendered [N, H, W, 3] uint8.
    """

    folder: Path
    metrics: Metrics
    records: list[ViewRecord]
    pictures: dict[str, np.ndarray]
    experiments: list[ExperimentTable]

    def cameras(self) -> list[tuple[list[float], list[float] | None]]:
        """True and estimated poses, in the order of the radii; without views by radius those of the turntable.

        A pose is the upper three rows of camera_to_world, row-major.
        """
        if self.records:
            ordered = sorted(self.records, key=lambda record: (record.radius, record.key))
            return [(record.true, record.estimated) for record in ordered]
        circle = [record for table in self.experiments if table.name == "turntable" for record in table.records]
        return [(each["true"], each["estimated"] or each["rendered_estimated"]) for each in circle]


def load_evaluation(folder: Path) -> Evaluation:
    """DataError if metrics.json, records.csv or images.npz is missing, damaged or of another evaluation."""
    metrics = load_metrics(folder / "metrics.json")
    experiments = load_experiments(folder)
    if not metrics.rows:
        if (folder / "records.csv").is_file():
            raise damaged(folder / "metrics.json", "no rows, but there is a records.csv beside it")
        return Evaluation(folder, metrics, [], {}, experiments)
    records: list[ViewRecord] = read_records(folder / "records.csv", RECORD)
    _check_same_views(folder / "records.csv", metrics, records)
    pictures = _load_pictures(folder / "images.npz", metrics, records)
    return Evaluation(folder, metrics, records, pictures, experiments)


def load_metrics(path: Path) -> Metrics:
    """metrics.json; DataError if it is missing or damaged."""
    try:
        return parse_metrics(read_json(path, AGAIN))
    except ValueError as error:
        raise damaged(path, error) from None


def parse_metrics(values: Any) -> Metrics:
    """ValueError with the first thing that is wrong."""
    try:
        return Metrics.model_validate_json(json.dumps(values, indent=1))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValidationError as error:
        raise ValueError(fault(error)) from None


def _check_same_views(path: Path, metrics: Metrics, records: list[ViewRecord]) -> None:
    """DataError unless the records are those that metrics.json is over: as many in every bin, with or without LPIPS."""
    bins = [record.bin for record in records]
    if max(bins) - min(bins) > BINS_AT_MOST:
        raise damaged(path, f"bins from {min(bins)} to {max(bins)}")
    if len({record.key for record in records}) < len(records):
        raise damaged(path, "a view is there twice")
    count = sum(row.n for row in metrics.bins)
    if count != len(records):
        raise damaged(path, f"{len(records)} views, but metrics.json is over {count}")
    for row in metrics.bins:
        found = sum(record.bin == row.radius[0] for record in records)
        if found != row.n:
            raise damaged(path, f"{found} views {row.name}, but metrics.json is over {row.n}")
    for name in ("lpips", *(name for name, measure in MEASURES.items() if measure.plotted)):
        found = sum(getattr(record, name) is not None for record in records)
        if found != (count if metrics.measured(name) else 0):
            raise damaged(path, f"{found} of {count} views have {name}, unlike metrics.json")
    if any((record.estimated is None) != (record.rotation_error_deg is None) for record in records):
        raise damaged(path, "a rotation error without an estimated pose")


def _load_pictures(path: Path, metrics: Metrics, records: list[ViewRecord]) -> dict[str, np.ndarray]:
    """key [N], bin [N], and true and rendered [N, H, W, 3] uint8 of views that `records` holds.

    Nothing is rendered where metrics.json says so.
    """
    arrays = load_arrays(path, AGAIN)
    names = [name for name in PICTURES if name != "rendered" or not metrics.no_picture]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise damaged(path, f"no {missing[0]}")
    pictures = {name: arrays[name] for name in names}
    keys = pictures["key"]
    if keys.ndim != 1 or keys.dtype.kind != "U" or pictures["bin"].dtype.kind not in "iu":
        raise damaged(path, f"key is {keys.dtype} {list(keys.shape)}, bin {pictures['bin'].dtype}")
    true, count = pictures["true"], len(pictures["key"])
    rendered = pictures.get("rendered", true)
    for name, picture in (("true", true), ("rendered", rendered)):
        if picture.dtype != np.uint8 or picture.ndim != 4 or picture.shape[3] != 3 or len(picture) != count:
            raise damaged(path, f"{name} is {picture.dtype} {list(picture.shape)}, not uint8 [{count}, H, W, 3]")
    if true.shape != rendered.shape or pictures["bin"].shape != (count,) or true.size == 0:
        raise damaged(path, f"true {list(true.shape)}, rendered {list(rendered.shape)}")
    bins = {record.key: record.bin for record in records}
    for key, bin_ in zip(keys.tolist(), pictures["bin"].tolist(), strict=True):
        if bins.get(key) != bin_:
            raise damaged(path, f"view {key} of bin {bin_} is not in records.csv")
    return pictures
