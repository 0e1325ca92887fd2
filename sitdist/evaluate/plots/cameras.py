"""True and estimated cameras in space."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Line3DCollection

from sitdist.evaluate.plots.style import BLUE, GREY, SIZE, VERMILION, sheet

CAMERAS_AT_MOST = 48
SIDES = {"from the side": (18, -60), "from above": (90, -90)}  # elevation and azimuth in degrees
RowMajor = list[float]  # the upper three rows of camera_to_world


def cameras_figure(cameras: list[tuple[RowMajor, RowMajor]]) -> Figure:
    """True and estimated cameras from the side and from above, joined by a line each; at most CAMERAS_AT_MOST, evenly.

    A camera is a dot with a long stroke where it looks (its -z) and a short one upwards (its +y).
    """
    chosen = np.linspace(0, len(cameras) - 1, min(CAMERAS_AT_MOST, len(cameras))).round().astype(int)
    true, estimated = np.array(cameras)[chosen].reshape(-1, 2, 3, 4).swapaxes(0, 1)
    figure = sheet((2 * SIZE[0], 1.15 * SIZE[1]), None)
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
