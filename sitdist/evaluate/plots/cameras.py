"""True and estimated cameras in space."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from sitdist.evaluate.plots.style import BLUE, GREY, SIZE, VERMILION, sheet
from sitdist.evaluate.units import ViewRecord

CAMERAS_AT_MOST = 48


def evenly(records: list[ViewRecord], at_most: int) -> list[ViewRecord]:
    """At most `at_most` of the records, evenly spaced in the order of their radii, the first and the last included."""
    ordered = sorted(records, key=lambda record: (record.radius, record.key))
    chosen = np.linspace(0, len(ordered) - 1, min(at_most, len(ordered))).round().astype(int)
    return [ordered[index] for index in chosen]


SIDES = {"side": ("from the side", 18, -60), "above": ("from above", 90, -90)}


def cameras_figure(records: list[ViewRecord], side: str) -> Figure:
    """True and estimated cameras, joined by a line each, as SIDES has it; at most CAMERAS_AT_MOST.

    A camera is a dot with a long stroke where it looks (its -z) and a short one upwards (its +y).
    """
    shown = evenly(records, CAMERAS_AT_MOST)
    true = np.array([record.true for record in shown]).reshape(-1, 3, 4)
    estimated = np.array([record.estimated for record in shown]).reshape(-1, 3, 4)
    figure = sheet((SIZE[0], 1.15 * SIZE[1]), None)
    axes = figure.add_axes((0.03, 0.13, 0.94, 0.77), projection="3d")
    assert isinstance(axes, Axes3D)
    _draw_cameras(axes, true, estimated)
    words, elevation, azimuth = SIDES[side]
    axes.view_init(elevation, azimuth)
    axes.set_proj_type("ortho")
    if elevation == 90:  # z points at the reader
        axes.set_zticks([])
        axes.set_zlabel("")
    count = f"{len(shown)}" if len(shown) == len(records) else f"{len(shown)} of {len(records)}, evenly by radius"
    figure.suptitle(f"Cameras {words} ({count})", x=0.03, ha="left", fontsize=11, fontweight="bold")
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
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
