"""Plots of the experiments beside the radii: turntable, interpolation, cycle, solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sitdist.evaluate.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    SERIES,
    VERMILION,
    legend_below,
    named,
    panel,
    plain_logarithm,
)

Result = dict[str, Any]  # a results.json
Records = Sequence[dict[str, Any]]  # the rows of its records.csv, parsed; None where nothing was measured


PARTS = {  # of every experiment the plots that there may be
    "turntable": ("circle", "rotation_error_deg", "psnr"),
    "interpolation": ("psnr_to_last", "lpips_to_last", "off_the_way_deg"),
    "cycle": ("rotation", "translation", "psnr"),
    "solvers": ("rotation_error_deg", "translation_error", "psnr", "ms_pose", "ms_picture"),
}


def experiment_figures(name: str, result: Result, records: Records) -> dict[str, Figure]:
    """All plots of an experiment by name, each beginning with the experiment's."""
    draw: dict[str, Callable[[Result, Records], Iterable[tuple[str, Figure | None]]]] = {
        "turntable": _turntable,
        "interpolation": _interpolation,
        "cycle": _cycle,
        "solvers": _solvers,
    }
    return {f"{name}_{part}": figure for part, figure in draw[name](result, records) if figure is not None}


# ----------------------------------------------------------------------------------------------------------- turntable

READ_OFF = {"": ("off the true picture", VERMILION), "rendered_": ("off the model's picture", GREEN)}


def _turntable(result: Result, records: Records) -> Iterable[tuple[str, Figure | None]]:
    yield "circle", _circle(records)
    for measure, title, unit in (("rotation_error_deg", "Rotation error", "degrees"), ("psnr", "PSNR", "dB")):
        yield measure, _along_the_circle(records, measure, title, unit)


def _circle(records: Records) -> Figure:
    """True and estimated camera positions from above."""
    figure, axes = panel("Turntable from above", "x", "y")
    true = np.array([record["true"] for record in records]).reshape(-1, 3, 4)[:, :, 3]
    closed = np.append(np.arange(len(true)), 0)
    axes.plot(*true[closed, :2].T, "-o", color=BLUE, markersize=5, linewidth=1, label="true")
    for prefix, (label, colour) in READ_OFF.items():
        shown = [i for i, record in enumerate(records) if record.get(f"{prefix}estimated")]
        if shown:
            places = np.array([records[i][f"{prefix}estimated"] for i in shown]).reshape(-1, 3, 4)[:, :, 3]
            axes.plot(*places[:, :2].T, ".", color=colour, markersize=5, label=label)
            for i, place in zip(shown, places, strict=True):
                axes.plot(*np.stack([true[i], place])[:, :2].T, "-", color=colour, linewidth=0.6)
    axes.plot(0.0, 0.0, "*", color="black", markersize=7, label="origin")
    axes.set_aspect("equal", adjustable="datalim")
    legend_below(figure, axes, columns=2)
    return figure


def _along_the_circle(records: Records, measure: str, title: str, unit: str) -> Figure | None:
    """A measure of every frame against the turn of the table; None where it was not measured."""
    figure, axes = panel(f"{title} along the circle", "turn (deg)", unit)
    turn = 360.0 * np.arange(len(records)) / len(records)
    for prefix, (label, colour) in READ_OFF.items():
        values = [record[name] for record in records if record.get(name := f"{prefix}{measure}") is not None]
        if len(values) == len(records):
            name = label if "error" in measure else "rendered against true"
            axes.plot(turn, values, "-o", color=colour, markersize=3, label=name)
    if not axes.lines:
        return None
    axes.set_xlim(0, 360)
    axes.set_xticks(range(0, 361, 90))
    if "error" in measure:
        axes.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


# ------------------------------------------------------------------------------------------------------- interpolation


def _interpolation(result: Result, records: Records) -> Iterable[tuple[str, Figure | None]]:
    """Means over the pairs, a thin line for every pair."""
    panels = (
        ("psnr_to_last", "Smoothness", "PSNR to the picture before (dB)"),
        ("lpips_to_last", "Smoothness", "LPIPS to the picture before"),
        ("off_the_way_deg", "Off the great circle", "degrees"),
    )
    for measure, title, unit in panels:
        figure, axes = panel(f"Interpolation: {title[0].lower()}{title[1:]}", "step", unit)
        for method, colour in (("slerp", BLUE), ("blend", VERMILION)):
            ways: dict[str, list[float]] = {}
            for record in records:
                if record["method"] == method:
                    pair = record["key"].rsplit("_", 1)[0]
                    ways.setdefault(pair, []).append(np.nan if record[measure] is None else record[measure])
            table = np.array(list(ways.values()), dtype=float)  # [pairs, steps]
            steps = np.isfinite(table).all(0).nonzero()[0] if len(table) else np.zeros(0, int)
            if len(steps):
                axes.plot(steps, table[:, steps].T, color=colour, linewidth=0.5, alpha=0.4)
                axes.plot(steps, table[:, steps].mean(0), "-o", color=colour, markersize=4, label=f"{method}, mean")
        if axes.lines:
            legend_below(figure, axes)
            yield measure, figure


# --------------------------------------------------------------------------------------------------------------- cycle


def _cycle(result: Result, records: Records) -> Iterable[tuple[str, Figure | None]]:
    """Means by turn with their 95% intervals."""
    turns = [row["turn"] for row in result["rows"]]
    panels = (
        ("rotation", "Rotation", "degrees", (("rotation_drift_deg", 0), ("rotation_step_deg", 1))),
        ("translation", "Translation", "scene units", (("translation_drift", 0), ("translation_step", 1))),
        ("psnr", "PSNR", "dB", (("psnr", 2), ("psnr_to_last", 3))),
    )
    looks = (
        ("from the true pose", BLUE),
        ("from the turn before", ORANGE),
        ("to the true view", BLUE),
        ("to the view before", ORANGE),
    )
    for part, title, unit, curves in panels:
        figure, axes = panel(f"Cycle: {title}" if part == "psnr" else f"Cycle: {title.lower()}", "turn", unit)
        for name, look in curves:
            label, colour = looks[look]
            means, low, high = (np.array([row[name][end] for row in result["rows"]]) for end in ("mean", "low", "high"))
            axes.fill_between(turns, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(turns, means, "-o", color=colour, label=label)
        axes.set_xticks(turns)
        legend_below(figure, axes)
        yield part, figure


# ------------------------------------------------------------------------------------------------------------- solvers

SOLVERS = {"one_step": (VERMILION, "*"), "euler": (BLUE, "o"), "midpoint": (GREEN, "s"), "heun": (ORANGE, "^")}


def _solvers(result: Result, records: Records) -> Iterable[tuple[str, Figure | None]]:
    """Means against function evaluations, a curve for every solver; times of both tasks."""
    panels = (
        ("rotation_error_deg", "pose", "rotation_error_deg", "Pose: rotation error", "degrees", "linear"),
        ("translation_error", "pose", "translation_error", "Pose: translation error", "scene units", "linear"),
        ("psnr", "picture", "psnr", "Picture: PSNR", "dB", "linear"),
        ("ms_pose", "pose", "ms", "Pose: time", "ms a view", "log"),
        ("ms_picture", "picture", "ms", "Picture: time", "ms a view", "log"),
    )
    for part, task, name, title, unit, scale in panels:
        figure, axes = panel(title, "function evaluations (log)", unit if scale == "linear" else f"{unit} (log)")
        for solver, (colour, marker) in SOLVERS.items():
            rows = [row for row in result["rows"] if (row["task"], row["solver"]) == (task, solver) and name in row]
            rows = sorted(rows, key=lambda row: row["function_evaluations"])
            if rows:
                x, y = [row["function_evaluations"] for row in rows], [row[name]["mean"] for row in rows]
                axes.plot(x, y, "-", marker=marker, color=colour, markersize=5, label=solver)
        if axes.lines:
            for which in ("x", "y") if scale == "log" else ("x",):
                plain_logarithm(axes, which)
            legend_below(figure, axes, columns=4)
            yield part, figure


# ------------------------------------------------------------------------------------------------------------- several

AGAINST = {  # what a comparison draws: the task or method of the rows, the measure, the title and the unit
    "cycle": (
        ({}, "rotation_drift_deg", "Cycle: rotation drift", "degrees"),
        ({}, "translation_drift", "Cycle: translation drift", "scene units"),
        ({}, "psnr", "Cycle: PSNR to the true view", "dB"),
    ),
    "solvers": (
        ({"task": "pose", "solver": "heun"}, "rotation_error_deg", "Pose by heun: rotation error", "degrees"),
        ({"task": "pose", "solver": "heun"}, "translation_error", "Pose by heun: translation error", "scene units"),
        ({"task": "picture", "solver": "heun"}, "psnr", "Picture by heun: PSNR", "dB"),
        ({"task": "picture", "solver": "heun"}, "ms", "Picture by heun: time", "ms a view"),
    ),
}


def several_experiments(name: str, rows: dict[str, list[dict[str, Any]]]) -> Iterable[Figure]:
    """The curves of an experiment for several evaluations (name -> rows of results.json); none for those without."""
    against = "turn" if name == "cycle" else "function_evaluations"
    for wanted, measure, title, unit in AGAINST.get(name, ()):
        figure, axes = panel(title, against.replace("_", " "), unit)
        for number, (run, each) in enumerate(rows.items()):
            inside = [row for row in each if measure in row and all(row[key] == value for key, value in wanted.items())]
            if inside:
                x, y = [row[against] for row in inside], [row[measure]["mean"] for row in inside]
                axes.plot(x, y, "-o", color=SERIES[number % len(SERIES)], markersize=4, label=named(run))
        if axes.lines:
            if against == "turn":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            else:
                plain_logarithm(axes, "x")
            legend_below(figure, axes, columns=2)
            yield figure
