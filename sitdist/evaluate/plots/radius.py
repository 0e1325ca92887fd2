"""A measure against the radius, beside its baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sitdist.evaluate.measures import CODEC, CONSTANT, MEASURES, NEAREST, ViewRecord
from sitdist.evaluate.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SERIES,
    legend_below,
    named,
    panel,
    plain_logarithm,
)
from sitdist.evaluate.schema import Measure
from sitdist.evaluate.statistics import summarize

DISTANCE = "distance of the camera from the origin"
COUNTS_AT_MOST = 10  # bins that still have room for their number of views above the axes

LEGEND = (
    *("mean", "median", "middle half of the views"),
    *(CONSTANT, CODEC, NEAREST, "packing noise floor", "radii trained on"),
)

LOOKS = {CONSTANT: (GREY, "v"), NEAREST: (ORANGE, "s"), CODEC: (GREEN, "^")}  # of a baseline: colour and marker


def radius_figure(
    records: list[ViewRecord], name: str, training_radius: tuple[float, float], floor: float | None = None
) -> Figure:
    """One measure against the radius: mean, median and quartiles of every unit bin, beside the baselines' means.

    The radii that were trained on are shaded. `floor` is a level that holds for all radii: the packing's noise floor.
    Bins without views leave a gap.
    """
    measure = MEASURES[name]
    figure, axes = panel(_title(measure), DISTANCE, measure.title, pad=18)
    axes.use_sticky_edges = False  # no box may end on the frame
    bins = range(min(record.bin for record in records), max(record.bin for record in records) + 1)
    centres = np.array(bins) + 0.5
    values = [_values(records, name, bin_) for bin_ in bins]
    _draw_spread(axes, centres, values)
    for baseline in measure.baselines:
        label = MEASURES[baseline].label
        colour, marker = LOOKS[label]
        means = [_mean(_values(records, baseline, bin_)) for bin_ in bins]
        axes.plot(centres, means, "--", markersize=4, color=colour, marker=marker, label=label)
    if floor is not None:
        axes.axhline(floor, color=PURPLE, linestyle=":", linewidth=1.8, label="packing noise floor")
    axes.axvspan(*training_radius, color=BLUE, alpha=0.07, linewidth=0, label="radii trained on")
    _label(axes, measure, bins)
    _write_counts(axes, centres, values)
    legend_below(figure, axes, LEGEND)
    return figure


def _title(measure: Measure) -> str:
    return measure.label[0].upper() + measure.label[1:]


def _values(records: list[ViewRecord], field: str, bin_: int) -> np.ndarray:
    return np.array([getattr(record, field) for record in records if record.bin == bin_], dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _draw_spread(axes: Axes, centres: np.ndarray, values: list[np.ndarray]) -> None:
    """Quartiles as a box, the median as a stroke through it, the means as a line."""
    quartiles = [np.quantile(inside, [0.25, 0.5, 0.75]) if len(inside) else np.full(3, np.nan) for inside in values]
    low, median, high = np.array(quartiles).T  # [bins] each
    axes.bar(centres, high - low, 0.5, low, color=BLUE, alpha=0.25, linewidth=0, label="middle half of the views")
    axes.hlines(median, centres - 0.25, centres + 0.25, color=BLUE, linewidth=1.4, label="median")
    axes.plot(centres, [_mean(inside) for inside in values], "-o", color=BLUE, markersize=4.5, label="mean")


def _label(axes: Axes, measure: Measure, bins: range) -> None:
    """Scales; errors of poses are drawn on a logarithmic one where none of them is 0."""
    if measure.of == "pose" and axes.dataLim.y0 > 0:
        plain_logarithm(axes, "y")
        axes.set_ylabel(f"{measure.title}, log")
    axes.set_xlim(bins[0], bins[-1] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.grid(visible=False, axis="x")


def _write_counts(axes: Axes, centres: np.ndarray, values: list[np.ndarray]) -> None:
    """How many views each bin holds, above the axes, if there is room for it; the table says it anyway."""
    if len(centres) > COUNTS_AT_MOST:
        return
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": GREY}
    for centre, inside in zip(centres, values, strict=True):
        axes.annotate(f"n={len(inside)}", (centre, 1.0), (0, 3), axes.get_xaxis_transform(), **style)


def several_figure(records: dict[str, list[ViewRecord]], field: str) -> Figure:
    """One measure against the radius for several evaluations by name: means of unit bins with their 95% intervals."""
    measure = MEASURES[field]
    figure, axes = panel(_title(measure), DISTANCE, measure.title)
    bins = sorted({record.bin for each in records.values() for record in each})
    span = range(bins[0], bins[-1] + 1)
    for number, (name, each) in enumerate(records.items()):
        values = [[v for v in _values(each, field, bin_) if np.isfinite(v)] for bin_ in span]
        if not any(values):
            continue
        summaries = [summarize(inside) if inside else None for inside in values]
        mean, low, high = (
            np.array([np.nan if each is None else getattr(each, end) for each in summaries], dtype=float)
            for end in ("mean", "low", "high")
        )
        colour, centres = SERIES[number % len(SERIES)], np.array(span) + 0.5
        axes.fill_between(centres, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(centres, mean, "-o", color=colour, markersize=4, label=named(name))
    _label(axes, measure, span)
    legend_below(figure, axes, columns=2)
    return figure
