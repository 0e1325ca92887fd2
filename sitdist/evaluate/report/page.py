"""Pages of one file each: templates that share a head and a style, and pictures as part of the page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sitdist.evaluate.experiments.records import ExperimentTable
from sitdist.evaluate.measures import AGAIN, MEASURES, ViewRecord, damaged
from sitdist.evaluate.report.stored import Evaluation, Row
from sitdist.evaluate.report.tables import estimator_text, generator_text, how, tables_of
from sitdist.evaluate.statistics import AUC_DEFINITION, INTERVAL_DEFINITION
from sitdist.io.arrays import load_arrays
from sitdist.io.files import open_file


def render(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of the values; all of them are escaped."""
    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(inline=lambda name: Markup(read(name)), **values)


def read(name: str) -> str:
    """A file of this folder."""
    return files(__package__).joinpath(name).read_text()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file as part of the page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(picture: np.ndarray) -> str:
    """A picture [H, W, 3] uint8 as it is; the page enlarges small ones."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


WORST_SHOWN = 12  # of all views, and of every bin
STRIPS_SHOWN = 8
GIF_BYTES = 2**28


@dataclass(frozen=True)
class ShownView:
    """A view on a page: its key, what is said of it, and pictures (caption -> data URI)."""

    key: str
    text: str
    pictures: dict[str, str]


def page_of(evaluation: Evaluation, figures: dict[str, bytes]) -> str:
    """report.html of an evaluation and its plots (name -> PNG)."""
    metrics = evaluation.metrics
    kept = _kept(evaluation)
    return render(
        "report.html.jinja",
        metrics=metrics,
        how=how(metrics),
        tables=tables_of(metrics),
        plots={name: data_uri(png) for name, png in figures.items()},
        worst=_views(evaluation, kept[:WORST_SHOWN]),
        bins=[(row, _views(evaluation, _first_of(kept, row))) for row in metrics.bins],
        facts=_facts(evaluation),
        definitions=_definitions(evaluation),
        kinds={row.name: "bin" if row.is_bin else "range" for row in metrics.rows},
        experiments=[(table, experiment_pictures(evaluation.folder, table)) for table in evaluation.experiments],
        config=json.dumps(metrics.config, indent=1) if metrics.config else "",
    )


# --------------------------------------------------------------------------------------------------------------- views


def _kept(evaluation: Evaluation) -> list[ViewRecord]:
    """The records of the views whose pictures were kept, the worst first."""
    keys = set(evaluation.pictures["key"].tolist()) if evaluation.pictures else set()
    return sorted((record for record in evaluation.records if record.key in keys), key=lambda record: -record.rank)


def _first_of(kept: list[ViewRecord], row: Row) -> list[ViewRecord]:
    return [record for record in kept if record.bin == row.radius[0]][:WORST_SHOWN]


def _views(evaluation: Evaluation, records: list[ViewRecord]) -> list[ShownView]:
    return [
        ShownView(record.key, f"r = {record.radius:.2f}, {record.text()}", view_pictures(evaluation, record.key))
        for record in records
    ]


def view_pictures(evaluation: Evaluation, key: str) -> dict[str, str]:
    """The true and the rendered picture of a view that was kept, as data URIs."""
    pictures = evaluation.pictures
    place = pictures["key"].tolist().index(key)
    return {name: picture_uri(pictures[name][place]) for name in ("true", "rendered") if name in pictures}


# --------------------------------------------------------------------------------------------------------- experiments


def experiment_pictures(folder: Path, table: ExperimentTable) -> dict[str, str]:
    """The turntable's loop and the interpolation's strips (caption -> data URI)."""
    pictures = {}
    gif, strips = folder / table.name / "turntable.gif", folder / table.name / "strips.npz"
    if gif.is_file():
        with open_file(gif, AGAIN, GIF_BYTES) as file:
            data = file.read()
        if data[:3] != b"GIF":
            raise damaged(gif, "not a GIF")
        pictures[f"{table.rows[0].get('gif', '')}, a closed circle"] = data_uri(data, "image/gif")
    if strips.is_file():
        for name, strip in list(load_arrays(strips, AGAIN).items())[:STRIPS_SHOWN]:
            if strip.dtype != np.uint8 or strip.ndim != 3 or strip.shape[2] != 3 or not strip.size:
                raise damaged(strips, f"{name} is {strip.dtype} {list(strip.shape)}")
            pictures[name.replace("_", ": ")] = picture_uri(strip)
    return pictures


# --------------------------------------------------------------------------------------------------------------- words


def _definitions(evaluation: Evaluation) -> dict[str, str]:
    """What the tables' heads mean."""
    metrics = evaluation.metrics
    if not metrics.rows:
        return {}
    shown = {name: measure for name, measure in MEASURES.items() if measure.definition and metrics.measured(name)}
    return {measure.label: measure.definition for measure in shown.values()} | {
        "<5 deg": "Share of the views with a rotation error below 5 degrees.",
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
