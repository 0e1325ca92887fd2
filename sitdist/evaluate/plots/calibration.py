"""How often calibrated error bars hold."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from sitdist.evaluate.plots.style import BLUE, GREY, VERMILION, legend_below, panel


def calibration_figure(calibration: Any, name: str) -> Figure:
    """The share of errors within their bars against the share that is expected; `name`: rotation or translation.

    `calibration`: that of metrics.json.
    """
    figure, axes = panel(f"Error bars: {name}", "expected share", "share of errors within their bars")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="as expected")
    shares = getattr(calibration, name)
    for values, label, colour in (
        (shares, "all views", BLUE),
        (shares.largest_quarter, "largest quarter of the bars", VERMILION),
    ):
        axes.errorbar(
            calibration.expected,
            values.observed,
            values.standard_error,
            color=colour,
            marker="o",
            markersize=3,
            label=f"{label} ({values.n})",
        )
    axes.set_aspect("equal")
    legend_below(figure, axes)
    return figure
