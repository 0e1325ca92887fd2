"""The report's page: everything in one file that refers to nothing outside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sitdist.evaluate import plots
from sitdist.evaluate.experiments.tables import ExperimentTable
from sitdist.evaluate.report.stored import Evaluation, Row
from sitdist.evaluate.report.tables import estimator_text, generator_text, how, tables_of
from sitdist.evaluate.report.template import data_uri, picture_uri, render
from sitdist.evaluate.schema import damaged
from sitdist.evaluate.statistics import AUC_DEFINITION, INTERVAL_DEFINITION
from sitdist.evaluate.units import ViewRecord, view_error
from sitdist.io.files import open_file
from sitdist.io.npz import load_arrays

WORST_SHOWN = 12  # of all views, and of every bin
STRIPS_SHOWN = 8
GIF_BYTES = 2**28


@dataclass(frozen=True)
class View:
    """What the page shows of one view: pictures (name -> data URI), errors, and the poses' columns, all as text."""

    key: str
    radius: float
    pictures: dict[str, str]
    pose_error: str
    picture_error: str
    pose: list[tuple[str, str, str]]  # of what, true, estimated


@dataclass(frozen=True)
class Plot:
    """A plot on the page: the file's bytes as a URI, and what is said of it."""

    uri: str
    caption: str


@dataclass(frozen=True)
class ShownExperiment:
    """An experiment on the page: its table, its plots, and its pictures (caption -> data URI)."""

    table: ExperimentTable
    plots: list[Plot]
    pictures: dict[str, str]


def page_of(evaluation: Evaluation, figures: dict[str, bytes]) -> str:
    """report.html of an evaluation and its plots (name -> PNG)."""
    metrics = evaluation.metrics
    shown = [metric for metric in plots.METRICS if metric.field in figures]
    return render(
        "report.html.jinja",
        metrics=metrics,
        how=how(metrics),
        tables=tables_of(metrics),
        by_radius=[Plot(data_uri(figures[each.field]), each.definition) for each in shown],
        plots={name: data_uri(png) for name, png in figures.items()},
        bins=_views_by_bin(evaluation),
        worst=_worst(evaluation),
        facts=_facts(evaluation),
        definitions={metric.title: metric.definition for metric in shown} | _statistics(evaluation),
        kinds={row.name: "bin" if row.is_bin else "range" for row in metrics.rows},
        experiments=[_experiment(evaluation.folder, table, figures) for table in evaluation.experiments],
        cameras=_cameras(evaluation),
        config=json.dumps(metrics.config, indent=1) if metrics.config else "",
    )


# --------------------------------------------------------------------------------------------------------------- views


def _views_by_bin(evaluation: Evaluation) -> list[tuple[Row, list[View]]]:
    """Of every bin the views whose pictures were kept, the worst first, at most WORST_SHOWN."""
    kept = _kept(evaluation)
    inside = [[record for record in kept if record.bin == row.radius[0]] for row in evaluation.metrics.bins]
    return [
        (row, _views(evaluation, records[:WORST_SHOWN]))
        for row, records in zip(evaluation.metrics.bins, inside, strict=True)
    ]


def _worst(evaluation: Evaluation) -> list[View]:
    return _views(evaluation, _kept(evaluation)[:WORST_SHOWN])


def _kept(evaluation: Evaluation) -> list[ViewRecord]:
    """The records of the views whose pictures were kept, the worst first."""
    keys = set(evaluation.pictures["key"].tolist()) if evaluation.pictures else set()
    return sorted((record for record in evaluation.records if record.key in keys), key=view_error, reverse=True)


def _views(evaluation: Evaluation, records: list[ViewRecord]) -> list[View]:
    pictures = evaluation.pictures
    place = {key: i for i, key in enumerate(pictures["key"].tolist())} if records else {}
    return [
        _view(record, {name: pictures[name][place[record.key]] for name in ("true", "rendered") if name in pictures})
        for record in records
    ]


def _view(record: ViewRecord, pictures: dict[str, np.ndarray]) -> View:
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
        pictures={name: picture_uri(picture) for name, picture in pictures.items()},
        pose_error=pose_error,
        picture_error=picture_error,
        pose=_pose_lines(record),
    )


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


def _cameras(evaluation: Evaluation) -> list[dict[str, Any]]:
    """True and estimated cameras for the page's 3D view: the columns of camera_to_world, three numbers each."""

    def columns(pose: list[float] | None) -> list[float] | None:
        return None if pose is None else np.array(pose).reshape(3, 4).T.round(4).flatten().tolist()

    return [{"true": columns(true), "estimated": columns(estimated)} for true, estimated in evaluation.cameras()]


# --------------------------------------------------------------------------------------------------------- experiments


def _experiment(folder: Path, table: ExperimentTable, figures: dict[str, bytes]) -> ShownExperiment:
    own = [Plot(data_uri(png), "") for name, png in figures.items() if name.startswith(f"{table.name}_")]
    return ShownExperiment(table, own, experiment_pictures(folder, table))


def experiment_pictures(folder: Path, table: ExperimentTable) -> dict[str, str]:
    """The turntable's loop and the interpolation's strips (caption -> data URI)."""
    pictures = {}
    gif, strips = folder / table.name / "turntable.gif", folder / table.name / "strips.npz"
    if gif.is_file():
        with open_file(gif, "run `sitdist eval` again", GIF_BYTES) as file:
            data = file.read()
        if data[:3] != b"GIF":
            raise damaged(gif, "not a GIF")
        pictures[f"{table.rows[0].get('gif', '')}, a closed circle"] = data_uri(data, "image/gif")
    if strips.is_file():
        for name, strip in list(load_arrays(strips, "run `sitdist eval` again").items())[:STRIPS_SHOWN]:
            if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[2] != 3 or not strip.size:
                raise damaged(strips, f"{name} is {strip.dtype} {list(strip.shape)}")
            pictures[name.replace("_", ": ")] = picture_uri(strip)
    return pictures


# --------------------------------------------------------------------------------------------------------------- words


def _statistics(evaluation: Evaluation) -> dict[str, str]:
    """What the tables' other heads mean."""
    if not evaluation.metrics.rows:
        return {}
    return {
        "<5 deg, <10": "Share of the views with a rotation error below 5, 10 degrees.",
        "of radius": "Mean of the translation errors, each over the distance of the true camera to the origin.",
        "quartiles": "Half of the views lie between these two values.",
        "95% of mean": INTERVAL_DEFINITION,
        "AUC@30": AUC_DEFINITION,
    }


def _facts(evaluation: Evaluation) -> dict[str, str]:
    """How it was measured, and on what."""
    metrics = evaluation.metrics
    training = metrics.training_views
    low, high = metrics.training_radius
    height, width = evaluation.pictures["true"].shape[1:3] if evaluation.pictures else (0, 0)
    return {
        "run": metrics.run,
        "step": f"{metrics.step}",
        "dataset": metrics.dataset,
        "split": metrics.split,
        **({"views": f"{len(evaluation.records)} of {width} x {height} pixels"} if evaluation.records else {}),
        "pose estimator": metrics.no_pose or estimator_text(metrics),
        "picture generator": metrics.no_picture or generator_text(metrics),
        "sigma": f"{metrics.sigma:g}",
        "seed": f"{metrics.seed}",
        "training radii": f"{low:.2f} to {high:.2f}",
        "training views": f"{training.count}, of which {training.compared} are compared with"
        + (f" and {metrics.radius_augmented} are radius augmented" if metrics.radius_augmented else ""),
        "LPIPS": metrics.lpips,
        "versions": ", ".join(f"{name} {version}" for name, version in metrics.versions.items()),
        **metrics.provenance,
    }
