"""The view sphere: where training cameras look from, and how large errors are there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sitdist.evaluate.coverage import AZIMUTHS, HEIGHTS, cells
from sitdist.evaluate.plots.style import panel
from sitdist.evaluate.units import ViewRecord


def training_sphere_figure(counts: Sequence[Sequence[int]]) -> Figure:
    """How many training views look from every cell of the view sphere."""
    return _sphere(np.asarray(counts, dtype=float), "Training views on the view sphere", "views", "Blues")


def error_sphere_figure(records: list[ViewRecord]) -> Figure:
    """The mean rotation error of the views evaluated in every cell; cells without views are blank."""
    rows, columns = cells(np.array([record.true for record in records]).reshape(-1, 3, 4)[:, :, 3])
    errors = np.array([record.rotation_error_deg for record in records], dtype=np.float64)
    total, views = np.zeros((HEIGHTS, AZIMUTHS)), np.zeros((HEIGHTS, AZIMUTHS))
    np.add.at(total, (rows, columns), errors)
    np.add.at(views, (rows, columns), 1)
    mean = np.divide(total, views, out=np.full_like(total, np.nan), where=views > 0)
    return _sphere(mean, "Rotation error on the view sphere", "mean (deg)", "Oranges")


def _sphere(values: np.ndarray, title: str, scale: str, colours: str) -> Figure:
    """Cells [heights, azimuths] as a map that keeps areas."""
    figure, axes = panel(title, "azimuth (deg)", "height (sine of the elevation)")
    axes.grid(visible=False)
    image = axes.imshow(values, origin="lower", extent=(-180, 180, -1, 1), aspect="auto", cmap=colours, vmin=0.0)
    axes.set_xticks(range(-180, 181, 90))
    figure.colorbar(image, ax=axes, label=scale)
    return figure
