"""Where on the view sphere errors are large."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from sitdist.evaluate.measures import ViewRecord
from sitdist.evaluate.plots.style import panel

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
