"""How every plot looks: one panel a figure, so that it is legible on a phone and side by side on a wide page.

Figures are made of matplotlib's own objects and saved through Agg, so there is no display and no global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

DPI = 200
SIZE = (5.0, 4.1)  # inches

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, PURPLE, VERMILION, SKY = "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#56b4e9"
GREY = "#6b7280"
SERIES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)


def sheet(size: tuple[float, float], layout: Literal["constrained"] | None = "constrained") -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=size, dpi=DPI, layout=layout)


def panel(title: str, x: str, y: str, pad: float = 8.0) -> tuple[Figure, Axes]:
    """An empty figure of one panel with a grid, and its axes."""
    figure = sheet(SIZE)
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.88", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain_logarithm(axes: Axes, which: str) -> None:
    """A logarithmic `which` ("x" or "y") axis with ticks at 1, 2, 5 of every decade, written out."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def named(name: str) -> str:
    """A name as a curve's label: legends leave out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


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
