"""How often calibrated error bars hold."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from sitdist.evaluate.plots.style import BLUE, GREY, VERMILION, legend_below, panel


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
