"""Plots of an evaluation: every metric against the radius, the cameras in 3D, and rows of true and rendered views.

Figures are made of matplotlib's own objects and saved through Agg, so there is no display and no global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from sitdist.evaluate.units import ViewRecord

DPI = 200
CAMERAS_AT_MOST = 48
PICTURE_PIXELS = 128  # pictures smaller than this are enlarged by whole factors
COUNTS_AT_MOST = 10  # bins that still have room for their number of views above the axes

LEGEND = (
    *("mean", "median", "middle half of the views"),
    *("constant pose", "codec ceiling", "nearest training view", "packing noise floor", "radii trained on"),
)

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, PURPLE, VERMILION, GREY = "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#6b7280"


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


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- metric by radius


def metric_figure(
    records: list[ViewRecord], metric: Metric, training_radius: tuple[float, float], floor: float | None = None
) -> Figure:
    """One metric against the radius: mean, median and quartiles of every unit bin, beside the baselines' means.

    The radii that were trained on are shaded. `floor` is a level that holds for all radii: the packing's noise floor.
    Bins without views leave a gap.
    """
    figure = Figure(figsize=(5.0, 4.1), dpi=DPI, layout="constrained")
    axes = figure.subplots()
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
    _add_legend(figure, axes)
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
    """Title, scales and axes; errors are drawn on a logarithmic scale where none of them is 0."""
    logarithmic = metric.logarithmic and axes.dataLim.y0 > 0
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(metric.title, loc="left", fontsize=11, fontweight="bold", pad=18)
    axes.set_ylabel(metric.axis + (" (log)" if logarithmic else ""))
    axes.set_xlabel("distance of the camera from the origin")
    axes.set_xlim(bins[0], bins[-1] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.grid(axis="y", color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_counts(axes: Axes, centres: np.ndarray, values: list[np.ndarray]) -> None:
    """How many views each bin holds, above the axes, if there is room for it; the table says it anyway."""
    if len(centres) > COUNTS_AT_MOST:
        return
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": GREY}
    for centre, inside in zip(centres, values, strict=True):
        axes.annotate(f"n={len(inside)}", (centre, 1.0), (0, 3), axes.get_xaxis_transform(), **style)


def _add_legend(figure: Figure, axes: Axes) -> None:
    """The legend below the axes, in the order of LEGEND."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    labels = sorted(handles, key=LEGEND.index)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": 8, "frameon": False}
    figure.legend([handles[label] for label in labels], labels, **place)


# ------------------------------------------------------------------------------------------------------------- cameras


def evenly(records: list[ViewRecord], at_most: int) -> list[ViewRecord]:
    """At most `at_most` of the records, evenly spaced in the order of their radii, the first and the last included."""
    ordered = sorted(records, key=lambda record: (record.radius, record.key))
    chosen = np.linspace(0, len(ordered) - 1, min(at_most, len(ordered))).round().astype(int)
    return [ordered[index] for index in chosen]


def calibration_figure(calibration: dict[str, Any]) -> Figure:
    """The share of errors within their bars against the share that is expected, of rotations and translations."""
    figure = Figure(figsize=(10.0, 4.8), dpi=DPI, layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("rotation", "translation"), strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="as expected")
        shares = calibration[name]
        for values, label, colour in (
            (shares, "all views", BLUE),
            (shares["largest_quarter"], "largest quarter of the bars", VERMILION),
        ):
            axes.errorbar(
                calibration["expected"],
                values["observed"],
                values["standard_error"],
                color=colour,
                marker="o",
                markersize=3,
                label=f"{label} ({values['n']})",
            )
        axes.set(title=name, xlabel="expected share", ylabel="share of errors within their bars", aspect="equal")
        axes.legend(fontsize=9, frameon=False)
    return figure


def cameras_figure(records: list[ViewRecord]) -> Figure:
    """True and estimated cameras, joined by a line each, from the side and from above; at most CAMERAS_AT_MOST.

    A camera is a dot with a long stroke where it looks (its -z) and a short one upwards (its +y).
    """
    shown = evenly(records, CAMERAS_AT_MOST)
    true = np.array([record.true for record in shown]).reshape(-1, 3, 4)
    estimated = np.array([record.estimated for record in shown]).reshape(-1, 3, 4)
    figure = Figure(figsize=(10.0, 5.2), dpi=DPI)
    for left, title, elevation, azimuth in ((0.0, "from the side", 18, -60), (0.5, "from above", 90, -90)):
        axes = figure.add_axes((left, 0.16, 0.5, 0.72), projection="3d")
        assert isinstance(axes, Axes3D)
        _draw_cameras(axes, true, estimated)
        axes.view_init(elevation, azimuth)
        axes.set_proj_type("ortho")
        axes.set_title(title, fontsize=9, color=GREY)
        if elevation == 90:  # z points at the reader
            axes.set_zticks([])
            axes.set_zlabel("")
    count = f"{len(shown)}" if len(shown) == len(records) else f"{len(shown)} of {len(records)}, evenly by radius"
    figure.suptitle(f"True and estimated cameras ({count})", x=0.02, ha="left", fontsize=11, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def _draw_cameras(axes: Axes3D, true: np.ndarray, estimated: np.ndarray) -> None:
    """Poses [N, 3, 4] each: camera_to_world without its last row."""
    axes.computed_zorder = False  # the estimated on top of the true, wherever they stand
    length = 0.14 * float(np.abs(true[:, :, 3]).max())
    for poses, colour, label, size in ((true, BLUE, "true", 36), (estimated, VERMILION, "estimated", 9)):
        position, up, forward = poses[:, :, 3], poses[:, :, 1], -poses[:, :, 2]
        axes.scatter(*position.T, s=size, color=colour, depthshade=False, label=label)
        for direction, part in ((forward, length), (up, 0.5 * length)):
            strokes = np.stack([position, position + part * direction], axis=1)  # [N, 2, 3]
            axes.add_collection3d(Line3DCollection(strokes, colors=colour, linewidths=2.2 if size > 9 else 1.0))
    between = np.stack([true[:, :, 3], estimated[:, :, 3]], axis=1)
    axes.add_collection3d(Line3DCollection(between, colors=GREY, linewidths=1.0, label="translation error"))
    axes.scatter([0.0], [0.0], [0.0], marker="*", s=60, color="black", depthshade=False, label="origin")
    points = np.concatenate([between.reshape(-1, 3), np.zeros((1, 3))])
    lows, highs = points.min(0) - length, points.max(0) + length
    for axis, low, high, pad in zip("xyz", lows, highs, (-1.5, -1.5, -6.0), strict=True):
        getattr(axes, f"set_{axis}lim")(low, high)
        getattr(axes, f"set_{axis}label")(axis, labelpad=pad)
        getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(nbins=5))
    axes.set_box_aspect(highs - lows, zoom=1.2)
    axes.tick_params(labelsize=7)


# --------------------------------------------------------------------------------------------------------------- views


def views_figure(records: list[ViewRecord], pictures: dict[str, np.ndarray]) -> Figure:
    """A row for every radius bin: pairs true | rendered, with the view's pose errors and PSNR above each pair.

    `pictures` has key [N], bin [N], and true and rendered [N, H, W, 3] uint8; without `rendered` the true stand alone.
    """
    by_key = {record.key: record for record in records}
    bins, inside = np.unique(pictures["bin"], return_counts=True)
    side = max(pictures["true"].shape[1:3])
    cell = max(1, round(PICTURE_PIXELS / side)) * side / 150.0  # inches at 150 dots an inch
    size = (max(3.4, inside.max() * (2 * cell + 0.15) + 0.5), len(bins) * (cell + 0.25) + 0.75)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.supxlabel("above every pair: rotation error, translation error, PSNR", fontsize=7, color=GREY)
    figure.suptitle("True | rendered views", x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(len(bins), inside.max(), squeeze=False)
    for axes_row, bin_ in zip(grid, bins, strict=True):
        _draw_pairs(axes_row, np.flatnonzero(pictures["bin"] == bin_), pictures, by_key)
        axes_row[0].set_ylabel(f"r in {bin_} to {bin_ + 1}", fontsize=8)
    return figure


def _draw_pairs(
    axes_row: Iterable[Axes], indices: np.ndarray, pictures: dict[str, np.ndarray], records: dict[str, ViewRecord]
) -> None:
    for place, axes in enumerate(axes_row):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        if place < len(indices):
            index = indices[place]
            record = records[str(pictures["key"][index])]
            shown = [pictures[name][index] for name in ("true", "rendered") if name in pictures]
            axes.imshow(_side_by_side(*shown), interpolation="nearest")
            errors = {"{:.1f}°": record.rotation_error_deg, "{:.2f}": record.translation_error}
            errors["{:.1f} dB"] = record.psnr
            title = ", ".join(text.format(value) for text, value in errors.items() if value is not None)
            axes.set_title(title, fontsize=7, color="0.25", pad=2)


def _side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """One or two pictures [H, W, 3], enlarged by a whole factor if small, with a white stripe between."""
    factor = max(1, round(PICTURE_PIXELS / max(pictures[0].shape[:2])))
    left, *rest = (picture.repeat(factor, 0).repeat(factor, 1) for picture in pictures)
    if not rest:
        return left
    (right,) = rest
    stripe = np.full((len(left), 4, 3), 255, np.uint8)
    return np.concatenate([left, stripe, right], axis=1)
