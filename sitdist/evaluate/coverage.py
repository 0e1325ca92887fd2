"""How often cameras look from each part of the view sphere."""

from __future__ import annotations

import numpy as np

AZIMUTHS, HEIGHTS = 12, 6  # cells of the sphere, equal in area


def coverage_counts(places: np.ndarray) -> list[list[int]]:
    """How many of the positions [N, 3] lie in each cell: [heights from below, azimuths from -180 degrees]."""
    rows, columns = cells(places)
    counts = np.zeros((HEIGHTS, AZIMUTHS), dtype=int)
    np.add.at(counts, (rows, columns), 1)
    return counts.tolist()


def cells(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row and the column of every position's cell."""
    azimuth = np.arctan2(places[:, 1], places[:, 0])
    height = places[:, 2] / np.linalg.norm(places, axis=1).clip(1e-12)
    column = ((azimuth + np.pi) / (2 * np.pi) * AZIMUTHS).astype(int).clip(0, AZIMUTHS - 1)
    return ((height + 1) / 2 * HEIGHTS).astype(int).clip(0, HEIGHTS - 1), column
