"""Several evaluations side by side, as text and as a page: what they are of, their numbers, curves and views."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.experiments.tables import MEASURES, TITLES, ExperimentTable, measure_cell
from sitdist.evaluate.report.page import Plot, experiment_pictures
from sitdist.evaluate.report.stored import Evaluation, load_evaluation
from sitdist.evaluate.report.tables import (
    FOCAL_COLUMNS,
    LPIPS_COLUMNS,
    PICTURE_COLUMNS,
    POSE_COLUMNS,
    estimator_text,
    generator_text,
)
from sitdist.evaluate.report.template import data_uri, picture_uri, render
from sitdist.evaluate.units import view_error
from sitdist.io.atomic import check_free, write_atomically
from sitdist.io.ownership import check_ours

VIEWS_SHOWN = 12


@dataclass(frozen=True)
class Block:
    """A table whose columns are the evaluations."""

    title: str
    heads: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class SharedView:
    """A view that all evaluations hold: its key, and pictures (name -> data URI) with the errors below each."""

    key: str
    pictures: dict[str, tuple[str, str]]


def compare(folders: list[Path], out: Path | None = None, overwrite: bool = False) -> str:
    """Write a page with all evaluations side by side; returns its tables as text, and where the page is.

    `out`: by default comparison.html in the first folder, in place of an earlier one.

    DataError where a folder holds no evaluation, they have neither a row nor an experiment in common, or `out` is there
    already and not to be overwritten.
    """
    if out is not None:
        check_free(out, overwrite)
    elif not check_ours(folders[0], "evaluation"):
        raise DataError(f"{folders[0]}: holds no evaluation; run `sitdist eval` first, or give --out")
    names = short_names(folders)
    found = {name: load_evaluation(Path(folder)) for name, folder in zip(names, folders, strict=True)}
    radii, experiments = _radii(found), _experiments(found)
    if not radii and not experiments:
        given = ", ".join(map(str, folders))
        raise DataError(f"{given}: no radii and no experiment in common; evaluate the runs on the same split")
    facts = _facts(found)
    page = render(
        "compare.html.jinja",
        title="Evaluations side by side",
        facts=facts,
        radii=radii,
        by_radius=_plots_by_radius(found) if radii else [],
        experiments=[
            (name, block, _experiment_plots(found, name), _experiment_pictures(found, name))
            for name, block in experiments.items()
        ],
        views=_shared_views(found),
    )
    out = out or folders[0] / "comparison.html"
    write_atomically(out, lambda path: path.write_text(page))
    return "\n".join([*(_plain(block) for block in (facts, *radii, *experiments.values())), f"report: {out}"])


def short_names(folders: Sequence[Path]) -> list[str]:
    """The parts of the paths in which they differ, as short as they can be."""
    parts = [list(Path(os.path.normpath(folder)).parts) for folder in folders]
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    names = ["/".join(part) for part in parts]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


# -------------------------------------------------------------------------------------------------------------- tables


def _facts(found: dict[str, Evaluation]) -> Block:
    """What was evaluated, and how; lines in which the evaluations differ are marked."""
    columns = []
    for each in found.values():
        metrics = each.metrics
        columns.append(
            {
                "run": metrics.run,
                "step": f"{metrics.step}",
                "dataset": metrics.dataset,
                "dataset fingerprint": metrics.provenance.get("dataset fingerprint", "")[:12],
                "split": metrics.split,
                "views": f"{len(each.records)}",
                "poses": metrics.no_pose or estimator_text(metrics),
                "pictures": metrics.no_picture or generator_text(metrics),
                "sigma": f"{metrics.sigma:g}",
                "seed": f"{metrics.seed}",
                "training views": f"{metrics.training_views.count}"
                + (f", {metrics.radius_augmented} radius augmented" if metrics.radius_augmented else ""),
                "hardware": metrics.provenance.get("hardware", ""),
            }
        )
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return Block("What was evaluated", ["", *found], [line for line in lines if any(line[1:])])


def _radii(found: dict[str, Evaluation]) -> list[Block]:
    """A table for every row of the radii that all evaluations have."""
    first = next(iter(found.values())).metrics.rows
    columns = [*POSE_COLUMNS, *PICTURE_COLUMNS, *LPIPS_COLUMNS, *FOCAL_COLUMNS]
    blocks = []
    for name in (row.name for row in first):
        rows = [row for each in found.values() for row in each.metrics.rows if row.name == name]
        if len(rows) == len(found):
            shown = [column for column in columns if any(getattr(row, column.field) is not None for row in rows)]
            lines = [[f"{each.group} {each.head}", *(each.cell(row) for row in rows)] for each in shown]
            blocks.append(Block(name, ["", *found], [["n", *(f"{row.n}" for row in rows)], *lines]))
    return blocks


def _table(evaluation: Evaluation, name: str) -> ExperimentTable | None:
    return next((table for table in evaluation.experiments if table.name == name), None)


def _experiments(found: dict[str, Evaluation]) -> dict[str, Block]:
    """A table for every experiment that all evaluations have, over the rows that all of them have."""
    blocks = {}
    for name, title in TITLES.items():
        tables = [_table(each, name) for each in found.values()]
        have = [table for table in tables if table is not None]
        if len(have) == len(found):
            rows = [{_row_name(table, row): row for row in table.rows} for table in have]
            lines = [
                [f"{label}{MEASURES[measure][0]}", *(measure_cell(each[label], measure) for each in rows)]
                for label in rows[0]
                for measure in have[0].measures
                if all(label in each for each in rows) and measure in rows[0][label]
            ]
            blocks[name] = Block(title, ["", *found], lines)
    return blocks


def _row_name(table: ExperimentTable, row: dict[str, Any]) -> str:
    """What tells the row of an experiment from its others, to stand before a measure's name."""
    words = {"turn": "turn {}", "function_evaluations": "of {} evaluations"}
    return " ".join(words.get(key, "{}").format(row[key]) for key in table.labels) + (": " if table.labels else "")


def _plain(block: Block) -> str:
    """Aligned columns under the title."""
    columns = list(zip(block.heads, *block.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in (block.heads, *block.lines)
    ]
    return "\n".join([block.title, *rows, ""])


# --------------------------------------------------------------------------------------------------------------- plots


def _plots_by_radius(found: dict[str, Evaluation]) -> list[Plot]:
    """Every metric that an evaluation has, against the radius."""
    records = {name: each.records for name, each in found.items()}
    return [
        Plot(data_uri(plots.to_png(plots.several_figure(records, metric))), metric.definition)
        for metric in plots.METRICS
        if any(each.metrics.measured(metric.field) for each in found.values())
    ]


def _experiment_plots(found: dict[str, Evaluation], name: str) -> list[Plot]:
    tables = {run: table.rows for run, each in found.items() if (table := _table(each, name)) is not None}
    return [Plot(data_uri(plots.to_png(figure)), "") for figure in plots.several_experiments(name, tables)]


def _experiment_pictures(found: dict[str, Evaluation], name: str) -> dict[str, str]:
    """The pictures that the experiment of every evaluation left, by caption, those of the same kind together."""
    shown = [
        (caption, run, uri)
        for run, each in found.items()
        if (table := _table(each, name)) is not None
        for caption, uri in experiment_pictures(each.folder, table).items()
    ]
    captions = list(dict.fromkeys(caption for caption, _, _ in shown))
    ordered = sorted(shown, key=lambda each: captions.index(each[0]))
    return {f"{run}: {caption}": uri for caption, run, uri in ordered}


# --------------------------------------------------------------------------------------------------------------- views


def _shared_views(found: dict[str, Evaluation]) -> list[SharedView]:
    """Views whose pictures all evaluations kept, the worst by the largest of their errors first."""
    kept = [set(each.pictures["key"].tolist()) if each.pictures else set() for each in found.values()]
    keys = set.intersection(*kept)
    records = {name: {each.key: each for each in evaluation.records} for name, evaluation in found.items()}
    ordered = sorted(keys, key=lambda key: (-max(view_error(each[key]) for each in records.values()), key))
    shared = []
    for key in ordered[:VIEWS_SHOWN]:
        pictures: dict[str, tuple[str, str]] = {}
        for name, evaluation in found.items():
            arrays, record = evaluation.pictures, records[name][key]
            place = arrays["key"].tolist().index(key)
            if not pictures:
                pictures["true"] = (picture_uri(arrays["true"][place]), f"r = {record.radius:.2f}")
            errors = {"{:.2f}°": record.rotation_error_deg, "{:.3f}": record.translation_error}
            errors["{:.1f} dB"] = record.psnr
            text = ", ".join(style.format(value) for style, value in errors.items() if value is not None)
            shown = arrays["rendered" if "rendered" in arrays else "true"][place]
            pictures[name] = (picture_uri(shown), text)
        shared.append(SharedView(key, pictures))
    return shared
