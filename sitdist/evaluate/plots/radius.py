"""Every metric against the radius, beside its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
from sitdist.evaluate.statistics import summarize
from sitdist.evaluate.units import ViewRecord

COUNTS_AT_MOST = 10  # bins that still have room for their number of views above the axes

LEGEND = (
    *("mean", "median", "middle half of the views"),
    *("constant pose", "codec ceiling", "nearest training view", "packing noise floor", "radii trained on"),
)

# Okabe and Ito's colours, which the colour-blind can tell apart.


@dataclass(frozen=True)
class Baseline:
    """What a metric is held against: the field of ViewRecord, its name, and how its line looks."""

    field: str
    label: str
    colour: str
    marker: str


@dataclass(frozen=True)
class Metric:
    """A field of ViewRecord as the report shows it; `definition` is one line."""

    field: str
    title: str
    axis: str
    definition: str
    baselines: tuple[Baseline, ...] = ()
    logarithmic: bool = False


METRICS = (
    Metric(
        "rotation_error_deg",
        "Rotation error",
        "degrees, lower is better",
        "Angle between the true and the estimated camera rotation, both in SO(3): 2 asin(|R1 - R2|_F / (2 sqrt 2)).",
        (
            Baseline("constant_rotation_error_deg", "constant pose", GREY, "v"),
            Baseline("nearest_rotation_error_deg", "nearest training view", ORANGE, "s"),
        ),
        logarithmic=True,
    ),
    Metric(
        "translation_error",
        "Translation error",
        "scene units, lower is better",
        "Distance between the true and the estimated camera position, in the dataset's units.",
        (
            Baseline("constant_translation_error", "constant pose", GREY, "v"),
            Baseline("nearest_translation_error", "nearest training view", ORANGE, "s"),
        ),
        logarithmic=True,
    ),
    Metric(
        "psnr",
        "PSNR",
        "dB, higher is better",
        "Peak signal-to-noise ratio of the rendered against the true view for pixels in [0, 1]; "
        "means are over the views' own PSNRs.",
        (
            Baseline("codec_psnr", "codec ceiling", GREEN, "^"),
            Baseline("nearest_psnr", "nearest training view", ORANGE, "s"),
        ),
    ),
    Metric(
        "mae",
        "MAE",
        "of pixels in [0, 1], lower is better",
        "Mean absolute error of the rendered against the true view over pixels and colours, for pixels in [0, 1].",
        (Baseline("codec_mae", "codec ceiling", GREEN, "^"),),
    ),
    Metric(
        "ssim",
        "SSIM",
        "higher is better",
        "Structural similarity of the rendered and the true view: Gaussian window of 11 pixels and deviation 1.5.",
        (Baseline("codec_ssim", "codec ceiling", GREEN, "^"),),
    ),
    Metric(
        "lpips",
        "LPIPS",
        "lower is better",
        "Learned perceptual distance, version 0.1, of the rendered and the true view, both scaled to [-1, 1].",
    ),
)


def metric_figure(
    records: list[ViewRecord], metric: Metric, training_radius: tuple[float, float], floor: float | None = None
) -> Figure:
    """One metric against the radius: mean, median and quartiles of every unit bin, beside the baselines' means.

    The radii that were trained on are shaded. `floor` is a level that holds for all radii: the packing's noise floor.
    Bins without views leave a gap.
    """
    figure, axes = panel(metric.title, "distance of the camera from the origin", metric.axis, pad=18)
    axes.use_sticky_edges = False  # no box may end on the frame
    bins = range(min(record.bin for record in records), max(record.bin for record in records) + 1)
    centres = np.array(bins) + 0.5
    values = [_values(records, metric.field, bin_) for bin_ in bins]
    _draw_spread(axes, centres, values)
    for baseline in metric.baselines:
        means = [_mean(_values(records, baseline.field, bin_)) for bin_ in bins]
        style: dict[str, Any] = {"color": baseline.colour, "marker": baseline.marker, "label": baseline.label}
        axes.plot(centres, means, "--", markersize=4, **style)
    if floor is not None:
        axes.axhline(floor, color=PURPLE, linestyle=":", linewidth=1.8, label="packing noise floor")
    axes.axvspan(*training_radius, color=BLUE, alpha=0.07, linewidth=0, label="radii trained on")
    _label(axes, metric, bins)
    _write_counts(axes, centres, values)
    legend_below(figure, axes, LEGEND)
    return figure


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


def _label(axes: Axes, metric: Metric, bins: range) -> None:
    """Scales; errors are drawn on a logarithmic one where none of them is 0."""
    if metric.logarithmic and axes.dataLim.y0 > 0:
        plain_logarithm(axes, "y")
        axes.set_ylabel(f"{metric.axis} (log)")
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


def several_figure(records: dict[str, list[ViewRecord]], metric: Metric) -> Figure:
    """One metric against the radius for several evaluations by name: means of unit bins with their 95% intervals."""
    figure, axes = panel(metric.title, "distance of the camera from the origin", metric.axis)
    bins = sorted({record.bin for each in records.values() for record in each})
    span = range(bins[0], bins[-1] + 1)
    for number, (name, each) in enumerate(records.items()):
        values = [[v for v in _values(each, metric.field, bin_) if np.isfinite(v)] for bin_ in span]
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
    _label(axes, metric, span)
    legend_below(figure, axes, columns=2)
    return figure
