"""Several evaluations side by side, as text and as a page: what they are of, their numbers, curves and views."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sitdist.errors import DataError
from sitdist.evaluate import plots
from sitdist.evaluate.experiments.records import EXPERIMENTS
from sitdist.evaluate.measures import MEASURES
from sitdist.evaluate.report.page import ShownView, data_uri, render, view_pictures
from sitdist.evaluate.report.stored import Evaluation, load_evaluation
from sitdist.evaluate.report.tables import Of, estimator_text, generator_text, main_columns
from sitdist.io.atomic import check_free, write_atomically
from sitdist.io.ownership import check_ours

VIEWS_SHOWN = 12


@dataclass(frozen=True)
class Block:
    """A table whose columns are the evaluations."""

    title: str
    heads: list[str]
    lines: list[list[str]]


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
        experiments=experiments,
        views=_shared_views(found),
    )
    out = out or folders[0] / "comparison.html"
    write_atomically(out, lambda path: path.write_text(page))
    return "\n".join([*(_plain(block) for block in (facts, *radii, *experiments)), f"report: {out}"])


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
    blocks = []
    for name in (row.name for row in first):
        rows = [row for each in found.values() for row in each.metrics.rows if row.name == name]
        if len(rows) == len(found):
            shown = [
                column
                for of in get_args(Of)
                for column in main_columns(of, lambda _: True)
                if any(row.get(column.field) is not None for row in rows)
            ]
            lines = [[f"{each.group} {each.head}", *(each.cell(row) for row in rows)] for each in shown]
            blocks.append(Block(name, ["", *found], [["n", *(f"{row.n}" for row in rows)], *lines]))
    return blocks


def _experiments(found: dict[str, Evaluation]) -> list[Block]:
    """A table for every experiment that all evaluations have, over the rows that all of them have."""
    blocks = []
    for name, experiment in EXPERIMENTS.items():
        tables = [table for each in found.values() for table in each.experiments if table.name == name]
        if len(tables) == len(found):
            rows = [{tuple(row[label] for label in experiment.labels): row for row in table.rows} for table in tables]
            pairs = list(zip(tables, rows, strict=True))
            lines = [
                [" ".join([*map(str, labels), measure.title]), *(table.cell(by[labels], key) for table, by in pairs)]
                for labels in rows[0]
                for key, measure in experiment.measures.items()
                if all(key in by.get(labels, {}) for by in rows)
            ]
            blocks.append(Block(experiment.title, ["", *found], lines))
    return blocks


def _plain(block: Block) -> str:
    """Aligned columns under the title."""
    columns = list(zip(block.heads, *block.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in (block.heads, *block.lines)
    ]
    return "\n".join([block.title, *rows, ""])


# --------------------------------------------------------------------------------------------------- plots and views


def _plots_by_radius(found: dict[str, Evaluation]) -> list[str]:
    """Every plotted measure that an evaluation has against the radius, as data URIs."""
    records = {name: each.records for name, each in found.items()}
    return [
        data_uri(plots.to_png(plots.several_figure(records, name)))
        for name, measure in MEASURES.items()
        if measure.plotted and any(each.metrics.measured(name) for each in found.values())
    ]


def _shared_views(found: dict[str, Evaluation]) -> list[ShownView]:
    """Views whose pictures all evaluations kept, the worst by the largest of their errors first."""
    kept = [set(each.pictures["key"].tolist()) if each.pictures else set() for each in found.values()]
    records = [{record.key: record for record in each.records} for each in found.values()]
    worst = {key: max(each[key].rank for each in records) for key in set.intersection(*kept)}
    shared = []
    for key in sorted(worst, key=lambda key: (-worst[key], key))[:VIEWS_SHOWN]:
        pictures = {}
        for (name, evaluation), by_key in zip(found.items(), records, strict=True):
            own = view_pictures(evaluation, key)
            pictures["true"] = own["true"]
            pictures[f"{name}: {by_key[key].text()}"] = own.get("rendered", own["true"])
        shared.append(ShownView(key, f"r = {records[0][key].radius:.2f}", pictures))
    return shared
