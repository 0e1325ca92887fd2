"""Rows of true and rendered views."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sitdist.evaluate.plots.style import GREY
from sitdist.evaluate.units import ViewRecord

PICTURE_PIXELS = 128  # pictures smaller than this are enlarged by whole factors
LARGEST_PIXELS = 512  # and larger ones than this are made smaller
BINS_SHOWN, PAIRS_SHOWN = 16, 12


def views_figure(records: list[ViewRecord], pictures: dict[str, np.ndarray]) -> Figure:
    """A row for every radius bin: pairs true | rendered, with the view's pose errors and PSNR above each pair.

    Of at most BINS_SHOWN bins, evenly spaced, the first PAIRS_SHOWN views each.

    `pictures` has key [N], bin [N], and true and rendered [N, H, W, 3] uint8; without `rendered` the true stand alone.
    """
    by_key = {record.key: record for record in records}
    bins, inside = np.unique(pictures["bin"], return_counts=True)
    columns = min(inside.max(), PAIRS_SHOWN)
    bins = bins[np.linspace(0, len(bins) - 1, min(len(bins), BINS_SHOWN)).round().astype(int)]
    side = max(pictures["true"].shape[1:3])
    cell = min(max(1, round(PICTURE_PIXELS / side)) * side, LARGEST_PIXELS) / 150.0  # inches at 150 dots an inch
    size = (max(3.4, columns * (2 * cell + 0.15) + 0.5), len(bins) * (cell + 0.25) + 0.75)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.supxlabel("above every pair: rotation error, translation error, PSNR", fontsize=7, color=GREY)
    figure.suptitle("True | rendered views", x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(len(bins), columns, squeeze=False)
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
            axes.imshow(side_by_side(*shown), interpolation="nearest")
            errors = {"{:.1f}°": record.rotation_error_deg, "{:.2f}": record.translation_error}
            errors["{:.1f} dB"] = record.psnr
            title = ", ".join(text.format(value) for text, value in errors.items() if value is not None)
            axes.set_title(title, fontsize=7, color="0.25", pad=2)


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """One or two pictures [H, W, 3], enlarged by a whole factor if small, with a white stripe between."""
    factor = max(1, round(PICTURE_PIXELS / max(pictures[0].shape[:2])))
    left, *rest = (picture.repeat(factor, 0).repeat(factor, 1) for picture in pictures)
    if not rest:
        return left
    (right,) = rest
    stripe = np.full((len(left), 4, 3), 255, np.uint8)
    return np.concatenate([left, stripe, right], axis=1)
