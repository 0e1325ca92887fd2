"""What an evaluation leaves, read and checked: metrics.json, records.csv and images.npz."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sitdist.errors import DataError
from sitdist.evaluate.baselines import NoiseFloor
from sitdist.evaluate.experiments.tables import ExperimentTable, load_experiments
from sitdist.evaluate.plots import evenly
from sitdist.evaluate.statistics import Summary
from sitdist.evaluate.symmetry import Symmetries
from sitdist.evaluate.units import POSE_ENTRIES, ViewRecord

CAMERAS_SHOWN = 64
PICTURES = ("key", "bin", "true", "rendered")


class Row(BaseModel):
    """One row of the table: the views with a radius in `radius`, and summaries over exactly these."""

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    radius: tuple[int, int]
    n: int
    rotation_error_deg: Summary | None = None
    translation_error: Summary | None = None
    focal_error: Summary | None = None
    translation_share: Summary | None = None
    symmetric_rotation_error_deg: Summary | None = None
    symmetric_translation_error: Summary | None = None
    mae: Summary | None = None
    psnr: Summary | None = None
    object_psnr: Summary | None = None
    codec_object_psnr: Summary | None = None
    ssim: Summary | None = None
    lpips: Summary | None = None
    constant_rotation_error_deg: Summary
    constant_translation_error: Summary
    nearest_rotation_error_deg: Summary
    nearest_translation_error: Summary
    nearest_psnr: Summary
    codec_mae: Summary
    codec_psnr: Summary
    codec_ssim: Summary

    @field_validator("rotation_error_deg")
    @classmethod
    def _has_share(cls, summary: Summary | None) -> Summary | None:
        if summary is not None and summary.share_under_5_deg is None:
            raise ValueError("no share_under_5_deg")
        return summary

    @property
    def is_bin(self) -> bool:
        """Whether it is a unit bin, and not a range of them."""
        return self.radius[1] - self.radius[0] == 1

    def summaries(self) -> dict[str, Summary]:
        """What was measured, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Summary)}


POSE_MEASURES = ("rotation_error_deg", "translation_error")
PICTURE_MEASURES = ("psnr", "mae", "ssim")


class Metrics(BaseModel):
    """metrics.json. `lpips` is the backbone's identity, or why there is none.

    There are no rows where only experiments beside the radii were measured; then function_evaluations is None.
    `no_pose` and `no_picture`: why the model reads no poses or renders no pictures, None if it does.
    `radius_augmented`: how many training views were zoomed copies of others.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    run: str
    step: int
    dataset: str
    split: str
    estimator: str
    function_evaluations: int | None
    readout: str = "svd"
    refine: str | None = None
    not_converged: int = 0
    generator: str
    generator_steps: int
    guidance: float | None = None
    seed: int
    sigma: float
    noise_floor: NoiseFloor | None
    no_pose: str | None = None
    no_picture: str | None = None
    lpips: str
    training_radius: tuple[float, float]
    radius_augmented: int = 0
    training_views: dict[str, int]
    versions: dict[str, str]
    training_coverage: list[list[int]] | None = None
    provenance: dict[str, str] = Field(default={})
    config: dict[str, Any] = Field(default={})
    background: tuple[float, float, float] | None = None
    symmetry: Symmetries | None = None
    calibration: dict[str, Any] | None = None
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
        return bool(self.rows) and all(getattr(row, field) is not None for row in self.rows)

    @model_validator(mode="after")
    def _complete(self) -> Metrics:
        if not self.rows:
            return self
        if self.function_evaluations is None:
            raise ValueError("function_evaluations is missing")
        for reason, names in ((self.no_pose, POSE_MEASURES), (self.no_picture, PICTURE_MEASURES)):
            for name in names:
                if self.measured(name) == bool(reason):
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
        """True and estimated poses to be shown in space, at most CAMERAS_SHOWN, evenly by radius; else the turntable's.

        A pose is the upper three rows of camera_to_world, row-major.
        """
        if self.records:
            return [(record.true, record.estimated) for record in evenly(self.records, CAMERAS_SHOWN)]
        circle = [record for table in self.experiments if table.name == "turntable" for record in table.records]
        return [(each["true"], each.get("estimated") or each.get("rendered_estimated")) for each in circle]


def load_evaluation(folder: Path) -> Evaluation:
    """DataError if metrics.json, records.csv or images.npz is missing, damaged or of another evaluation."""
    metrics = load_metrics(folder / "metrics.json")
    experiments = load_experiments(folder)
    if not metrics.rows:
        if (folder / "records.csv").is_file():
            raise damaged(folder / "metrics.json", "no rows, but there is a records.csv beside it")
        return Evaluation(folder, metrics, [], {}, experiments)
    records = _load_records(folder / "records.csv", metrics)
    pictures = _load_pictures(folder / "images.npz", metrics, records)
    return Evaluation(folder, metrics, records, pictures, experiments)


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `sitdist eval` first")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise damaged(path, error) from None


def damaged(path: Path, reason: object) -> DataError:
    return DataError(f"{path}: damaged ({' '.join(str(reason).split())[:200]}); run `sitdist eval` again")


def load_metrics(path: Path) -> Metrics:
    """metrics.json; DataError if it is missing or damaged."""
    try:
        return parse_metrics(json.loads(_text(path)))
    except ValueError as error:
        raise damaged(path, error) from None


def parse_metrics(values: Any) -> Metrics:
    """ValueError with the first thing that is wrong."""
    try:
        return Metrics.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{where}: {first['msg']}") from None


def _load_records(path: Path, metrics: Metrics) -> list[ViewRecord]:
    """The records, whose bins must hold as many views as metrics.json says."""
    text = _text(path)
    if not text.endswith("\n"):
        raise damaged(path, "the last line is cut off")
    try:
        records = [_record(row) for row in csv.DictReader(io.StringIO(text))]
    except KeyError as error:
        raise damaged(path, f"no column {error}") from None
    except (TypeError, ValueError, csv.Error) as error:
        raise damaged(path, error) from None
    _check_same_views(path, metrics, records)
    return records


def _check_same_views(path: Path, metrics: Metrics, records: list[ViewRecord]) -> None:
    """DataError unless the records are those that metrics.json is over: as many in every bin, with or without LPIPS."""
    count = sum(row.n for row in metrics.bins)
    if count != len(records):
        raise damaged(path, f"{len(records)} views, but metrics.json is over {count}")
    for row in metrics.bins:
        found = sum(record.bin == row.radius[0] for record in records)
        if found != row.n:
            raise damaged(path, f"{found} views {row.name}, but metrics.json is over {row.n}")
    with_lpips = sum(record.lpips is not None for record in records)
    if with_lpips != (count if metrics.measured("lpips") else 0):
        raise damaged(path, f"{with_lpips} of {count} views have LPIPS, but metrics.json says '{metrics.lpips}'")


def _record(row: dict[str, str]) -> ViewRecord:
    """One line of records.csv; KeyError, TypeError or ValueError if it is not one."""
    values: dict[str, Any] = {}
    for field in fields(ViewRecord):
        if field.type in ("float", "float | None"):
            text = row[field.name] if field.default is MISSING else row.get(field.name)
            values[field.name] = None if field.type == "float | None" and not text else _number(text or "")
    values["true"] = [_number(row[f"true_{entry}"]) for entry in POSE_ENTRIES]
    estimated = [row[f"estimated_{entry}"] for entry in POSE_ENTRIES]
    values["estimated"] = [_number(text) for text in estimated] if any(estimated) else None
    return ViewRecord(key=row["key"], label=int(row["label"]), bin=int(row["bin"]), **values)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _load_pictures(path: Path, metrics: Metrics, records: list[ViewRecord]) -> dict[str, np.ndarray]:
    """key [N], bin [N], and true and rendered [N, H, W, 3] uint8 of views that `records` holds.

    Nothing is rendered where metrics.json says so.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `sitdist eval` first")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pictures = {name: arrays[name] for name in PICTURES if name != "rendered" or not metrics.no_picture}
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise damaged(path, error) from None
    true, count = pictures["true"], len(pictures["key"])
    rendered = pictures.get("rendered", true)
    for name, picture in (("true", true), ("rendered", rendered)):
        if picture.dtype != np.uint8 or picture.ndim != 4 or picture.shape[3] != 3 or len(picture) != count:
            raise damaged(path, f"{name} is {picture.dtype} {list(picture.shape)}, not uint8 [{count}, H, W, 3]")
    if true.shape != rendered.shape or pictures["bin"].shape != (count,) or count == 0:
        raise damaged(path, f"true {list(true.shape)}, rendered {list(rendered.shape)}")
    strangers = set(pictures["key"].tolist()) - {record.key for record in records}
    if strangers:
        raise damaged(path, f"view {min(strangers)} is not in records.csv")
    return pictures
