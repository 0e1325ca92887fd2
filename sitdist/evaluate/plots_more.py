"""Plots of coverage of the view sphere, cycles and solvers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sitdist.evaluate.coverage import AZIMUTHS, HEIGHTS, cells
from sitdist.evaluate.plots import BLUE, DPI, GREEN, ORANGE, VERMILION
from sitdist.evaluate.units import ViewRecord


def coverage_figure(counts: Sequence[Sequence[int]], records: list[ViewRecord]) -> Figure:
    """Training views in every cell of the view sphere, beside the mean rotation error of the views evaluated there."""
    rows, columns = cells(np.array([record.true for record in records]).reshape(-1, 3, 4)[:, :, 3])
    errors = np.array([record.rotation_error_deg for record in records], dtype=np.float64)
    total, views = np.zeros((HEIGHTS, AZIMUTHS)), np.zeros((HEIGHTS, AZIMUTHS))
    np.add.at(total, (rows, columns), errors)
    np.add.at(views, (rows, columns), 1)
    mean = np.divide(total, views, out=np.full_like(total, np.nan), where=views > 0)
    figure = Figure(figsize=(10.0, 3.6), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, 2)
    panels = ((np.asarray(counts, dtype=float), "training views", "Blues"), (mean, "mean error (deg)", "Oranges"))
    for axes, (values, title, colours) in zip(grid, panels, strict=True):
        image = axes.imshow(values, origin="lower", extent=(-180, 180, -1, 1), aspect="auto", cmap=colours)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("azimuth (deg)")
        axes.set_ylabel("height (sine of the elevation)")
        axes.set_xticks(range(-180, 181, 90))
        figure.colorbar(image, ax=axes)
    figure.suptitle("Coverage of the view sphere", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def cycle_figure(result: dict[str, Any]) -> Figure:
    """Drift of poses and PSNR of views by turn."""
    figure = Figure(figsize=(10.0, 3.6), dpi=DPI, layout="constrained")
    turns = [row["turn"] for row in result["rows"]]
    panels = (
        ("degrees from the true pose", (("rotation_drift_deg", "drift", BLUE), ("rotation_step_deg", "step", ORANGE))),
        ("PSNR (dB)", (("psnr", "to the true view", BLUE), ("psnr_to_last", "to the last view", GREEN))),
    )
    for axes, (title, curves) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, label, colour in curves:
            summaries = [row[name] for row in result["rows"]]
            means = np.array([each["mean"] for each in summaries])
            low, high = (np.array([each[end] for each in summaries]) for end in ("low", "high"))
            axes.fill_between(turns, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(turns, means, "-o", color=colour, label=label)
        axes.set_xlabel("turn")
        axes.set_ylabel(title)
        axes.set_xticks(turns)
        axes.legend(frameon=False)
        _tidy(axes)
    return figure


def solvers_figure(result: dict[str, Any]) -> Figure:
    """Error of poses and PSNR of pictures against function evaluations, a curve for every solver."""
    figure = Figure(figsize=(10.0, 3.8), dpi=DPI, layout="constrained")
    panels = (
        ("pose", "rotation_error_deg", "rotation error (deg)"),
        ("picture", "psnr", "PSNR (dB)"),
        ("picture", "ms", "ms a view"),
    )
    colours = {"one_step": VERMILION, "euler": BLUE, "midpoint": GREEN, "heun": ORANGE}
    for axes, (task, name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for solver, colour in colours.items():
            rows = [row for row in result["rows"] if row["solver"] == solver and task in row["task"] and name in row]
            rows = sorted(rows, key=lambda row: row["function_evaluations"])
            if rows:
                evaluations = [row["function_evaluations"] for row in rows]
                axes.plot(evaluations, [row[name]["mean"] for row in rows], "o-", color=colour, ms=4, label=solver)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("function evaluations")
        axes.set_ylabel(title)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
    return figure


def _tidy(axes: Any) -> None:
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
