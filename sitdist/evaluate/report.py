"""The report of an evaluation: a table for the terminal, plots, one self-contained page, and the same in TensorBoard.

Everything is made from metrics.json, records.csv and images.npz, so that it can be made again without the run. The
page fetches nothing: its pictures are part of it.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import shutil
import textwrap
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sitdist.config import AdaptiveSolver
from sitdist.data.format import write_atomically
from sitdist.errors import DataError
from sitdist.evaluate import plots, plots_more
from sitdist.evaluate.baselines import NoiseFloor
from sitdist.evaluate.experiments.tables import ExperimentTable, load_experiments
from sitdist.evaluate.statistics import AUC_DEFINITION, INTERVAL_DEFINITION, THRESHOLDS, Summary
from sitdist.evaluate.symmetry import Symmetries
from sitdist.evaluate.units import POSE_ENTRIES, ViewRecord, view_error

PICTURES = ("key", "bin", "true", "rendered")
LINE = 108  # characters of the terminal's table
NEAREST_POSE = (
    "Baselines, by their means: constant is the mean training pose, nearest the pose of the training view with the "
    "nearest latent."
)
NOISE_FLOOR = (
    "The noise floor is what the noise of a packed pose leaves on average to an estimator that recovers x0 exactly; "
    "one_step estimates the mean of x0 and has none."
)
INTERVAL = f"95% of mean: {INTERVAL_DEFINITION}"
AUC = f"AUC@30: {AUC_DEFINITION[0].lower()}{AUC_DEFINITION[1:]}"
NEAREST_PICTURE = (
    "Baselines, by their means: codec is the true view encoded and decoded, the ceiling of every rendered view; "
    "nearest is the training view with the nearest camera, decoded."
)


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

    `no_pose` and `no_picture`: why the model reads no poses or renders no pictures, None if it does.
    `radius_augmented`: how many training views were zoomed copies of others.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    run: str
    step: int
    dataset: str
    split: str
    estimator: str
    function_evaluations: int
    readout: str = "svd"
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
    rows: list[Row] = Field(min_length=1)
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
        """Whether every row has this measure."""
        return all(getattr(row, field) is not None for row in self.rows)

    @model_validator(mode="after")
    def _complete(self) -> Metrics:
        for reason, names in ((self.no_pose, POSE_MEASURES), (self.no_picture, PICTURE_MEASURES)):
            for name in names:
                if self.measured(name) == bool(reason):
                    raise ValueError(f"{name} is {'there' if reason else 'missing'}")
        return self


def write_report(folder: Path) -> Path:
    """Write plots/*.png, tensorboard/ and report.html into an evaluation's folder, in place of earlier ones.

    DataError if metrics.json, records.csv or images.npz is missing, damaged or of another evaluation. Returns the path
    of report.html.
    """
    folder = Path(folder)
    metrics = load_metrics(folder / "metrics.json")
    records = _load_records(folder / "records.csv", metrics)
    pictures = _load_pictures(folder / "images.npz", metrics, records)
    experiments = load_experiments(folder)
    figures = _figures(metrics, records, pictures, experiments)
    page = _page(metrics, records, pictures, figures, _shown_experiments(folder, experiments, figures))
    for old in (folder / "plots").glob("*.png"):
        if old.stem not in figures:
            old.unlink()
    for name, png in figures.items():
        _write_bytes(folder / "plots" / f"{name}.png", png)
    _write_tensorboard(folder / "tensorboard", metrics, figures, records)
    _write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def _write_bytes(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _figures(
    metrics: Metrics,
    records: list[ViewRecord],
    pictures: dict[str, np.ndarray],
    experiments: list[ExperimentTable],
) -> dict[str, bytes]:
    """PNG files by name."""
    figures = {
        metric.field: plots.metric_figure(records, metric, metrics.training_radius, metrics.floors.get(metric.field))
        for metric in plots.METRICS
        if metrics.measured(metric.field)
    }
    if not metrics.no_pose:
        figures["cameras"] = plots.cameras_figure(records)
        if metrics.training_coverage:
            figures["coverage"] = plots_more.coverage_figure(metrics.training_coverage, records)
    if metrics.calibration is not None:
        figures["calibration"] = plots.calibration_figure(metrics.calibration)
    draw = {"cycle": plots_more.cycle_figure, "solvers": plots_more.solvers_figure}
    figures |= {table.name: draw[table.name](table.result) for table in experiments if table.name in draw}
    figures["views"] = plots.views_figure(records, pictures)
    return {name: plots.to_png(figure) for name, figure in figures.items()}


# ------------------------------------------------------------------------------------------------------------ reading


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; run `sitdist eval` first")
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> DataError:
    return DataError(f"{path}: damaged ({' '.join(str(reason).split())[:200]}); run `sitdist eval` again")


def load_metrics(path: Path) -> Metrics:
    """metrics.json; DataError if it is missing or damaged."""
    try:
        return _parse_metrics(json.loads(_text(path)))
    except ValueError as error:
        raise _damaged(path, error) from None


def _parse_metrics(values: Any) -> Metrics:
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
        raise _damaged(path, "the last line is cut off")
    try:
        records = [_record(row) for row in csv.DictReader(io.StringIO(text))]
    except KeyError as error:
        raise _damaged(path, f"no column {error}") from None
    except (TypeError, ValueError, csv.Error) as error:
        raise _damaged(path, error) from None
    _check_same_views(path, metrics, records)
    return records


def _check_same_views(path: Path, metrics: Metrics, records: list[ViewRecord]) -> None:
    """DataError unless the records are those that metrics.json is over: as many in every bin, with or without LPIPS."""
    count = sum(row.n for row in metrics.bins)
    if count != len(records):
        raise _damaged(path, f"{len(records)} views, but metrics.json is over {count}")
    for row in metrics.bins:
        found = sum(record.bin == row.radius[0] for record in records)
        if found != row.n:
            raise _damaged(path, f"{found} views {row.name}, but metrics.json is over {row.n}")
    with_lpips = sum(record.lpips is not None for record in records)
    if with_lpips != (count if metrics.measured("lpips") else 0):
        raise _damaged(path, f"{with_lpips} of {count} views have LPIPS, but metrics.json says '{metrics.lpips}'")


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
        raise _damaged(path, error) from None
    true, count = pictures["true"], len(pictures["key"])
    rendered = pictures.get("rendered", true)
    for name, picture in (("true", true), ("rendered", rendered)):
        if picture.dtype != np.uint8 or picture.ndim != 4 or picture.shape[3] != 3 or len(picture) != count:
            raise _damaged(path, f"{name} is {picture.dtype} {list(picture.shape)}, not uint8 [{count}, H, W, 3]")
    if true.shape != rendered.shape or pictures["bin"].shape != (count,) or count == 0:
        raise _damaged(path, f"true {list(true.shape)}, rendered {list(rendered.shape)}")
    strangers = set(pictures["key"].tolist()) - {record.key for record in records}
    if strangers:
        raise _damaged(path, f"view {min(strangers)} is not in records.csv")
    return pictures


# -------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Column:
    """A statistic of a summary, under `group` and `head`; `style` is how it is written.

    `interval` and `quartiles` are two numbers each.
    """

    group: str
    head: str
    field: str
    statistic: str = "mean"
    style: str = ".2f"

    def cell(self, row: Row) -> str:
        """The number as text; n/a where it was not measured."""
        summary = getattr(row, self.field)
        ends = {"interval": ("low", "high"), "quartiles": ("q25", "q75")}.get(self.statistic, (self.statistic,))
        values = [None if summary is None else getattr(summary, end) for end in ends]
        return "n/a" if None in values else " to ".join(format(value, self.style) for value in values)


def _columns(group: str, field: str, style: str, baselines: dict[str, str], share: bool = False) -> list[Column]:
    """Mean, median, share under 5 degrees where there is one, and the baselines' means (head -> field)."""
    columns = [Column(group, "mean", field, "mean", style), Column(group, "median", field, "median", style)]
    columns += [Column(group, "<5 deg", field, "share_under_5_deg", ".1%")] if share else []
    return columns + [Column(group, head, name, "mean", style) for head, name in baselines.items()]


POSE_COLUMNS = [
    *_columns(
        "rotation error (deg)",
        "rotation_error_deg",
        ".2f",
        {"constant": "constant_rotation_error_deg", "nearest": "nearest_rotation_error_deg"},
        share=True,
    ),
    *_columns(
        "translation error",
        "translation_error",
        ".3f",
        {"constant": "constant_translation_error", "nearest": "nearest_translation_error"},
    ),
]
PICTURE_COLUMNS = [
    *_columns("PSNR (dB)", "psnr", ".2f", {"codec": "codec_psnr", "nearest": "nearest_psnr"}),
    *_columns("MAE", "mae", ".4f", {"codec": "codec_mae"}),
    *_columns("SSIM", "ssim", ".3f", {"codec": "codec_ssim"}),
]
POSE_SPREAD = [
    Column("rotation error (deg)", "95% of mean", "rotation_error_deg", "interval"),
    Column("rotation error (deg)", "quartiles", "rotation_error_deg", "quartiles"),
    *(
        Column("rotation error (deg)", f"<{angle}", "rotation_error_deg", f"share_under_{angle}_deg", ".0%")
        for angle in THRESHOLDS
    ),
    Column("rotation error (deg)", "AUC@30", "rotation_error_deg", "auc_30_deg", ".3f"),
    Column("translation error", "95% of mean", "translation_error", "interval", ".3f"),
    Column("translation error", "of radius", "translation_share", "mean", ".1%"),
]
SYMMETRIC_COLUMNS = [
    Column("rotation error (deg)", "plain", "rotation_error_deg"),
    Column("rotation error (deg)", "up to symmetry", "symmetric_rotation_error_deg"),
    Column("translation error", "plain", "translation_error", "mean", ".3f"),
    Column("translation error", "up to symmetry", "symmetric_translation_error", "mean", ".3f"),
]
PICTURE_SPREAD = [
    Column("PSNR (dB)", "95% of mean", "psnr", "interval"),
    Column("PSNR (dB)", "quartiles", "psnr", "quartiles"),
    Column("object PSNR", "mean", "object_psnr"),
    Column("object PSNR", "median", "object_psnr", "median"),
    Column("object PSNR", "codec", "codec_object_psnr"),
    Column("SSIM", "95% of mean", "ssim", "interval", ".3f"),
]
LPIPS_COLUMNS = _columns("LPIPS", "lpips", ".3f", {})
FOCAL_COLUMNS = _columns("focal error (%)", "focal_error", ".2f", {})


@dataclass(frozen=True)
class Table:
    """A block of the summary: its columns, a line of cells for every row (name and n first), and what it means."""

    title: str
    columns: list[Column]
    lines: list[list[str]]
    notes: list[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The names above the columns, in order, with how many columns each spans."""
        names = [column.group for column in self.columns]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _tables(metrics: Metrics) -> list[Table]:
    """Poses and pictures, by radius, beside their baselines."""
    pose_columns = POSE_COLUMNS + (FOCAL_COLUMNS if metrics.measured("focal_error") else [])
    picture_columns = PICTURE_COLUMNS + (LPIPS_COLUMNS if metrics.measured("lpips") else [])
    pose, picture = (_lines(metrics.rows, columns) for columns in (pose_columns, picture_columns))
    lpips = f"LPIPS backbone: {metrics.lpips}." if metrics.measured("lpips") else f"LPIPS {metrics.lpips}."
    pose_notes, picture_notes = [NEAREST_POSE], [NEAREST_PICTURE, lpips]
    if metrics.radius_augmented:
        count, of = metrics.radius_augmented, metrics.training_views["count"]
        note = f"Radius augmented: {count} of the {of} training views are zoomed copies, for every row and baseline."
        pose_notes.append(note)
        picture_notes.append(note)
    if metrics.floors:
        floor = [
            format(metrics.floors[column.field], column.style)
            if column.head == "mean" and column.field in metrics.floors
            else ""
            for column in pose_columns
        ]
        pose.append(["noise floor", "", *floor])
        pose_notes.append(NOISE_FLOOR)
    if metrics.no_pose:
        pose_notes.insert(0, f"No pose is read off a picture: {metrics.no_pose}.")
    if metrics.no_picture:
        picture_notes.insert(0, f"No picture is rendered: {metrics.no_picture}.")
    tables = [
        Table("Pose of a picture", pose_columns, pose, pose_notes),
        *_spread_tables(metrics, "rotation_error_deg", "Pose: spread", POSE_SPREAD, [INTERVAL, AUC]),
        Table("Picture of a pose", picture_columns, picture, picture_notes),
        *_spread_tables(metrics, "psnr", "Picture: spread", PICTURE_SPREAD, [_object_note(metrics)]),
    ]
    return tables + _symmetry_tables(metrics) + _label_tables(metrics, pose_columns, picture_columns)


def _spread_tables(metrics: Metrics, field: str, title: str, columns: list[Column], notes: list[str]) -> list[Table]:
    """Intervals, quartiles and shares, where `field` was measured by an evaluation that states them."""
    if not metrics.measured(field) or any(getattr(row, field).low is None for row in metrics.rows):
        return []
    return [Table(title, columns, _lines(metrics.rows, columns), notes)]


def _object_note(metrics: Metrics) -> str:
    if metrics.background is None:
        return "PSNR on the object: n/a, as the corners of the views have no common colour, so no plain background."
    colour = " ".join(f"{255 * value:.0f}" for value in metrics.background)
    return (
        f"PSNR on the object: over the pixels where the true view differs from the background ({colour} of 255) by "
        "more than 4, for views that show the object."
    )


def _symmetry_tables(metrics: Metrics) -> list[Table]:
    """Errors up to the object's symmetries, if it has any; a note on what was looked for else."""
    symmetry = metrics.symmetry
    if symmetry is None:
        return []
    columns = SYMMETRIC_COLUMNS if symmetry.symmetries else []
    return [Table("Symmetry", columns, _lines(metrics.rows, columns) if columns else [], _symmetry_notes(symmetry))]


def _symmetry_notes(symmetry: Symmetries) -> list[str]:
    """How many views coincide with one from far away, which pairs, and which motions follow."""
    notes = [
        f"{symmetry.coinciding} of {symmetry.examined} training views examined coincide with a view from a camera that "
        "is more than 20 deg away: their latents are as near as those of neighbouring cameras."
    ]
    if symmetry.pairs:
        shown = ", ".join(f"{pair.a}-{pair.b} ({pair.angle_deg:.0f} deg)" for pair in symmetry.pairs[:6])
        notes.append(f"The nearest such pairs, by number of the training sample: {shown}.")
    notes += [
        f"Symmetry of label {motion.label}: a turn of {motion.angle_deg:.1f} deg, shown by {motion.support:.0%} of "
        "the views examined. Errors up to symmetry are against the nearest pose from which the view is the same."
        for motion in symmetry.symmetries
    ]
    if not symmetry.symmetries:
        notes.append("That is no symmetry of the object, so there is no error up to symmetry beside the plain one.")
    return notes


def _label_tables(metrics: Metrics, pose_columns: list[Column], picture_columns: list[Column]) -> list[Table]:
    """The tables once more by object, where there are several."""
    if not metrics.labels:
        return []
    pose, picture = (_lines(metrics.labels, columns) for columns in (pose_columns, picture_columns))
    return [
        Table("Pose, by object", pose_columns, pose, []),
        Table("Picture, by object", picture_columns, picture, []),
    ]


def _lines(rows: list[Row], columns: list[Column]) -> list[list[str]]:
    return [[row.name, f"{row.n}", *(column.cell(row) for column in columns)] for row in rows]


def format_table(metrics: dict[str, Any]) -> str:
    """The contents of metrics.json as plain text: what was evaluated and how, poses by radius, pictures by radius.

    DataError if `metrics` is not what an evaluation writes.
    """
    try:
        parsed = _parse_metrics(metrics)
    except ValueError as error:
        raise _damaged(Path("metrics.json"), error) from None
    blocks = [f"{parsed.run}, step {parsed.step}, on {parsed.split} of {parsed.dataset}", _how(parsed)]
    return "\n".join(blocks + [_plain(table) for table in _tables(parsed)])


def _generator(metrics: Metrics) -> str:
    how = "adaptive steps" if metrics.generator in get_args(AdaptiveSolver) else f"{metrics.generator_steps} steps"
    guidance = "" if metrics.guidance is None else f", guidance {metrics.guidance:g}"
    return f"{metrics.generator} ({how}{guidance})"


def _how(metrics: Metrics) -> str:
    evaluations = metrics.function_evaluations
    poses = f"poses by {metrics.estimator} ({evaluations} function evaluation{'s' if evaluations > 1 else ''})"
    poses += f", read out by {metrics.readout}" if metrics.readout != "svd" else ""
    poses += f", {metrics.not_converged} of them not converged" if metrics.not_converged else ""
    pictures = f"pictures by {_generator(metrics)}"
    parts = [*([] if metrics.no_pose else [poses]), *([] if metrics.no_picture else [pictures])]
    augmented = ["trained radius augmented"] if metrics.radius_augmented else []
    return ", ".join([*parts, f"sigma {metrics.sigma:g}", f"seed {metrics.seed}", *augmented])


def _plain(table: Table) -> str:
    """The table with aligned columns, its groups in a line above the heads, and its notes below."""
    heads = ["radius", "n", *(column.head for column in table.columns)]
    notes = [textwrap.fill(note, LINE) for note in table.notes]
    if not table.lines:
        return "\n".join(["", table.title, *notes])
    widths = [max(map(len, cells)) for cells in zip(heads, *table.lines, strict=True)]
    widths[0] = max(widths[0], len(table.title) - 1 - widths[1])
    spans = [2, *(count for _, count in table.groups)]
    names = [table.title, *(name for name, _ in table.groups)]
    parts = _parts([" " * width for width in widths], widths, spans)
    top = [
        names[0].ljust(len(parts[0])),
        *(f" {name} ".center(len(part), "-") for name, part in zip(names[1:], parts[1:], strict=True)),
    ]
    lines = [top, *(_parts(cells, widths, spans) for cells in (heads, *table.lines))]
    return "\n".join(["", *(" | ".join(line).rstrip() for line in lines), *notes])


def _parts(cells: list[str], widths: list[int], spans: list[int]) -> list[str]:
    """Cells, the first to the left and the others to the right of their columns, joined within each span."""
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]
    edges = [sum(spans[:i]) for i in range(len(spans) + 1)]
    return [" ".join(padded[a:b]) for a, b in itertools.pairwise(edges)]


# --------------------------------------------------------------------------------------------------------- tensorboard


def _write_tensorboard(folder: Path, metrics: Metrics, figures: dict[str, bytes], records: list[ViewRecord]) -> None:
    """One event file in `folder`, in place of earlier ones: the table's numbers as scalars, the plots as images.

    Unit bins are curves, MEASURE/STATISTIC at the bin's lower edge; ranges have tags of their own,
    radius_A-B/MEASURE/STATISTIC, at the run's step.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    with SummaryWriter(str(unfinished)) as board:
        for row in metrics.rows:
            low, high = row.radius
            prefix, step = ("", low) if row.is_bin else (f"radius_{low}-{high}/", metrics.step)
            for tag, value in _scalars(row).items():
                board.add_scalar(f"{prefix}{tag}", value, step)
        if not metrics.no_pose:
            board.add_mesh("cameras", *_camera_points(records), global_step=metrics.step)
        whole = max(metrics.rows, key=lambda row: row.n)
        options = {"estimator": metrics.estimator, "generator": metrics.generator, "seed": metrics.seed}
        results = {f"hparam/{tag}": value for tag, value in _scalars(whole).items() if tag.endswith("/mean")}
        options |= {"generator_steps": metrics.generator_steps, "sigma": metrics.sigma, "split": metrics.split}
        for part in hparams(options, results):  # add_hparams would begin a file of its own
            board.file_writer.add_summary(part, metrics.step)
        for name, value in results.items():
            board.add_scalar(name, value, metrics.step)
        for name, value in metrics.floors.items():
            board.add_scalar(f"noise_floor/{name}", value, metrics.step)
        for name, png in figures.items():
            board.add_image(
                f"report/{name}", np.array(Image.open(io.BytesIO(png)).convert("RGB")), metrics.step, dataformats="HWC"
            )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _camera_points(records: list[ViewRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Positions [1, 2 N, 3] of true cameras, then of estimated ones, and their colours, for a mesh of points."""
    true, estimated = (
        np.array([getattr(record, name) for record in records]).reshape(-1, 3, 4)[:, :, 3]
        for name in ("true", "estimated")
    )
    colours = np.array([[47, 143, 208]] * len(true) + [[224, 102, 42]] * len(estimated), dtype=np.uint8)
    return np.concatenate([true, estimated])[None].astype(np.float32), colours[None]


def _scalars(row: Row) -> dict[str, float]:
    """MEASURE/STATISTIC -> number, for all that the row holds."""
    return {
        f"{measure}/{statistic}": float(value)
        for measure, summary in row.summaries().items()
        for statistic, value in summary.to_dict().items()
    }


# ---------------------------------------------------------------------------------------------------------------- page


@dataclass(frozen=True)
class View:
    """What the page shows of one view: pictures (name -> data URI), errors, and the poses' columns, all as text."""

    key: str
    radius: float
    pictures: dict[str, str]
    pose_error: str
    picture_error: str
    pose: list[tuple[str, str, str]]  # of what, true, estimated


def _view(record: ViewRecord, true: np.ndarray, rendered: np.ndarray | None) -> View:
    errors = {"PSNR {:.2f} dB": record.psnr, "MAE {:.4f}": record.mae, "SSIM {:.3f}": record.ssim}
    errors["LPIPS {:.3f}"] = record.lpips
    pose = {"rotation {:.2f}° off": record.rotation_error_deg, "translation {:.3f} off": record.translation_error}
    pose["focal length {:.1f}% off"] = record.focal_error
    pose_error, picture_error = (
        ", ".join(text.format(value) for text, value in values.items() if value is not None) or "not measured"
        for values in (pose, errors)
    )
    return View(
        key=record.key,
        radius=record.radius,
        pictures={"true": _picture_uri(true)} | ({} if rendered is None else {"rendered": _picture_uri(rendered)}),
        pose_error=pose_error,
        picture_error=picture_error,
        pose=_pose_lines(record),
    )


@dataclass(frozen=True)
class ShownExperiment:
    """An experiment on the page: its table, and its pictures (caption -> data URI)."""

    table: ExperimentTable
    pictures: dict[str, str]


def _shown_experiments(
    folder: Path, experiments: list[ExperimentTable], figures: dict[str, bytes]
) -> list[ShownExperiment]:
    shown = []
    for table in experiments:
        pictures = {table.title: _data_uri(figures[table.name])} if table.name in figures else {}
        gif, strips = folder / table.name / "turntable.gif", folder / table.name / "strips.npz"
        if gif.is_file():
            uri = f"data:image/gif;base64,{base64.b64encode(gif.read_bytes()).decode()}"
            pictures[f"{table.result.get('gif')}, a closed circle"] = uri
        if strips.is_file():
            with np.load(strips, allow_pickle=False) as arrays:
                pictures |= {name: _picture_uri(arrays[name]) for name in arrays.files[:6]}
        shown.append(ShownExperiment(table, pictures))
    return shown


def _page(
    metrics: Metrics,
    records: list[ViewRecord],
    pictures: dict[str, np.ndarray],
    figures: dict[str, bytes],
    experiments: list[ShownExperiment],
) -> str:
    """report.html: everything in one file that refers to nothing outside it."""
    shown = [metric for metric in plots.METRICS if metric.field in figures]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("sitdist.evaluate").joinpath("report.html.jinja").read_text()
    return environment.from_string(template).render(
        metrics=metrics,
        how=_how(metrics),
        tables=_tables(metrics),
        shown=shown,
        plots={name: _data_uri(png) for name, png in figures.items()},
        bins=_views_by_bin(metrics, records, pictures),
        facts=_facts(metrics, records, pictures),
        definitions=plots.METRICS,
        kinds={row.name: "bin" if row.is_bin else "range" for row in metrics.rows},
        size=pictures["true"].shape[1:3],
        experiments=experiments,
        cameras=_cameras(records),
        script=Markup(files("sitdist.evaluate").joinpath("cameras.js").read_text()),
        provenance=metrics.provenance,
        config=json.dumps(metrics.config, indent=1) if metrics.config else "",
        worst=_worst(metrics, records, pictures),
    )


def _views_by_bin(
    metrics: Metrics, records: list[ViewRecord], pictures: dict[str, np.ndarray]
) -> list[tuple[Row, list[View]]]:
    by_key = {record.key: record for record in records}
    views: dict[int, list[View]] = {row.radius[0]: [] for row in metrics.bins}
    rendered_or_none = pictures.get("rendered", [None] * len(pictures["key"]))
    for key, true, rendered in zip(pictures["key"].tolist(), pictures["true"], rendered_or_none, strict=True):
        record = by_key[key]
        views[record.bin].append(_view(record, true, rendered))
    order = {record.key: view_error(record) for record in records}
    for inside in views.values():
        inside.sort(key=lambda view: -order[view.key])
    return [(row, views[row.radius[0]]) for row in metrics.bins]


CAMERAS_SHOWN = 64
WORST_SHOWN = 12


def _worst(metrics: Metrics, records: list[ViewRecord], pictures: dict[str, np.ndarray]) -> list[View]:
    """The views with the largest errors of all whose pictures are there, the worst first."""
    views = {view.key: view for _, inside in _views_by_bin(metrics, records, pictures) for view in inside}
    ordered = sorted((record for record in records if record.key in views), key=view_error, reverse=True)
    return [views[record.key] for record in ordered[:WORST_SHOWN]]


def _cameras(records: list[ViewRecord]) -> dict[str, Any]:
    """True and estimated cameras for the page's 3D view: the columns of camera_to_world, three numbers each."""

    def columns(pose: list[float] | None) -> list[float] | None:
        return None if pose is None else np.array(pose).reshape(3, 4).T.round(4).flatten().tolist()

    shown = plots.evenly(records, CAMERAS_SHOWN)
    return {"cameras": [{"true": columns(each.true), "estimated": columns(each.estimated)} for each in shown]}


def _pose_lines(record: ViewRecord) -> list[tuple[str, str, str]]:
    """The columns of both camera_to_world matrices as text."""
    names = (("position", 3), ("right, +x", 0), ("up, +y", 1), ("back, +z", 2))
    true, estimated = (
        [_vector(np.array(pose).reshape(3, 4)[:, column]) if pose else "n/a" for _, column in names]
        for pose in (record.true, record.estimated)
    )
    return list(zip((name for name, _ in names), true, estimated, strict=True))


def _vector(values: np.ndarray) -> str:
    return " ".join(f"{value + 0.0:5.2f}" for value in values.round(2))  # + 0.0 turns -0.0 into 0.0


def _facts(metrics: Metrics, records: list[ViewRecord], pictures: dict[str, np.ndarray]) -> dict[str, str]:
    height, width = pictures["true"].shape[1:3]
    training, evaluations = metrics.training_views, metrics.function_evaluations
    low, high = metrics.training_radius
    return {
        "run": metrics.run,
        "step": f"{metrics.step}",
        "dataset": metrics.dataset,
        "split": metrics.split,
        "views": f"{len(records)} of {width} x {height} pixels",
        "pose estimator": metrics.no_pose
        or f"{metrics.estimator}, {evaluations} function evaluation{'s' if evaluations > 1 else ''}",
        "picture generator": metrics.no_picture or _generator(metrics),
        "sigma": f"{metrics.sigma:g}",
        "seed": f"{metrics.seed}",
        "training radii": f"{low:.2f} to {high:.2f}",
        "training views": f"{training['count']}, of which {training['compared']} are compared with"
        + (f" and {metrics.radius_augmented} are radius augmented" if metrics.radius_augmented else ""),
        "LPIPS": metrics.lpips,
        "versions": ", ".join(f"{name} {version}" for name, version in metrics.versions.items()),
    }


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _picture_uri(picture: np.ndarray) -> str:
    """A picture [H, W, 3] uint8 as it is; the page enlarges small ones."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return _data_uri(buffer.getvalue())
