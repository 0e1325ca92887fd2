"""The plots of an evaluation, each a figure of one panel; only that of the cameras has two.

Figures are made of matplotlib's own objects and saved through Agg, so there is no display and no global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from sitdist.evaluate.measures import CODEC, CONSTANT, MEASURES, NEAREST, Measure, ViewRecord
from sitdist.evaluate.statistics import summarize

DPI = 200
SIZE = (5.0, 4.1)  # inches

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, PURPLE, VERMILION, SKY = "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9"
GREY = "#6b7280"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)


def panel(title: str, x: str, y: str, pad: float = 8.0) -> tuple[Figure, Axes]:
    """An empty figure of one panel with a grid, and its axes."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure: Figure, axes: Axes, order: Sequence[str] = (), columns: int = 3) -> None:
    """The legend below the axes, in the order drawn or in `order`."""
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    labels = sorted(handles, key=order.index) if order else list(handles)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    legend = figure.legend([handles[label] for label in labels], labels, **place)
    for text in legend.get_texts():  # names of runs are no formulas
        text.set_parse_math(False)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


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
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
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
        label = f" {name}" if name.startswith("_") else name  # legends leave out those that begin with an underscore
        axes.plot(centres, mean, "-o", color=colour, markersize=4, label=label)
    _label(axes, measure, span)
    legend_below(figure, axes, columns=2)
    return figure


def calibration_figure(calibration: Any) -> Figure:
    """The share of errors within their bars against the share that is expected; `calibration`: that of metrics.json."""
    figure, axes = panel("Error bars", "expected share", "share of errors within their bars")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="as expected")
    for name, colour in (("rotation", BLUE), ("translation", VERMILION)):
        shares = getattr(calibration, name)
        for each, line, which in ((shares, "-", "all views"), (shares.largest_quarter, ":", "largest quarter")):
            axes.errorbar(
                calibration.expected,
                each.observed,
                each.standard_error,
                color=colour,
                linestyle=line,
                marker="o",
                markersize=3,
                label=f"{name}, {which} ({each.n})",
            )
    axes.set_aspect("equal")
    legend_below(figure, axes, columns=2)
    return figure


AZIMUTHS, HEIGHTS = 12, 6  # cells of the sphere, equal in area


def sphere_figure(records: list[ViewRecord]) -> Figure:
    """The mean rotation error of the views in every cell, as a map that keeps areas; cells without views are blank."""
    places = np.array([record.true for record in records]).reshape(-1, 3, 4)[:, :, 3]
    errors = np.array([record.rotation_error_deg for record in records], dtype=np.float64)
    total, views = np.zeros((HEIGHTS, AZIMUTHS)), np.zeros((HEIGHTS, AZIMUTHS))
    np.add.at(total, cells(places), errors)
    np.add.at(views, cells(places), 1)
    mean = np.divide(total, views, out=np.full_like(total, np.nan), where=views > 0)
    figure, axes = panel("Rotation error on the view sphere", "azimuth (deg)", "height (sine of the elevation)")
    axes.grid(visible=False)
    image = axes.imshow(mean, origin="lower", extent=(-180, 180, -1, 1), aspect="auto", cmap="Oranges", vmin=0.0)
    axes.set_xticks(range(-180, 181, 90))
    figure.colorbar(image, ax=axes, label="mean (deg)")
    return figure


def cells(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of the cell of every position [N, 3]: heights from below, azimuths from -180 degrees."""
    azimuth = np.arctan2(places[:, 1], places[:, 0])
    height = places[:, 2] / np.linalg.norm(places, axis=1).clip(1e-12)
    column = ((azimuth + np.pi) / (2 * np.pi) * AZIMUTHS).astype(int).clip(0, AZIMUTHS - 1)
    return ((height + 1) / 2 * HEIGHTS).astype(int).clip(0, HEIGHTS - 1), column


CAMERAS_AT_MOST = 48
SIDES = {"from the side": (18, -60), "from above": (90, -90)}  # elevation and azimuth in degrees
RowMajor = list[float]  # the upper three rows of camera_to_world


def cameras_figure(cameras: list[tuple[RowMajor, RowMajor]]) -> Figure:
    """True and estimated cameras from the side and from above, joined by a line each; at most CAMERAS_AT_MOST, evenly.

    A camera is a dot with a long stroke where it looks (its -z) and a short one upwards (its +y).
    """
    chosen = np.linspace(0, len(cameras) - 1, min(CAMERAS_AT_MOST, len(cameras))).round().astype(int)
    true, estimated = np.array(cameras)[chosen].reshape(-1, 2, 3, 4).swapaxes(0, 1)
    figure = Figure(figsize=(2 * SIZE[0], 1.15 * SIZE[1]), dpi=DPI)
    for number, (words, (elevation, azimuth)) in enumerate(SIDES.items()):
        axes = figure.add_axes((0.015 + 0.5 * number, 0.13, 0.47, 0.77), projection="3d")
        assert isinstance(axes, Axes3D)
        _draw_cameras(axes, true, estimated)
        axes.set_title(words, fontsize=9)
        axes.view_init(elevation, azimuth)
        axes.set_proj_type("ortho")
        if elevation == 90:  # z points at the reader
            axes.set_zticks([])
            axes.set_zlabel("")
    count = f"{len(chosen)}" if len(chosen) == len(cameras) else f"{len(chosen)} of {len(cameras)}, evenly"
    figure.suptitle(f"Cameras ({count})", x=0.03, ha="left", fontsize=11, fontweight="bold")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
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
