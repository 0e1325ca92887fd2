"""Work units of an evaluation: which views there are, and how they are cut into units.

A unit is a chunk of at most `batch` views of one radius bin. The list of units follows from the views alone, never from
the number of processes, so a killed evaluation goes on with the units that are not on disk yet, on any number of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sitdist.errors import DataError
from sitdist.evaluate.measures import ViewRecord

PICTURES_PER_BIN = 4
WORST_PER_UNIT = 2
BINS_AT_MOST = 10_000
EDGE = 1e-6  # a camera this close below a bin's edge stands on it: radii are norms of rounded numbers


@dataclass(frozen=True)
class ViewRef:
    """One view to evaluate: its key, its position (keys its noise), its radius, and the bin [bin, bin + 1) of it."""

    key: str
    position: int
    radius: float
    bin: int


@dataclass(frozen=True)
class Unit:
    """Views of one bin that are evaluated as one batch; the first `pictures` of them also leave their pictures."""

    number: int
    views: tuple[ViewRef, ...]
    pictures: int

    @property
    def name(self) -> str:
        return f"unit_{self.number:05d}"


def radius_bins(radii: list[float], limits: tuple[int, int] | None) -> tuple[list[int | None], tuple[int, int]]:
    """The unit bin [a, a + 1) of every radius and the whole range (a, b); the last bin holds its upper edge too.

    With `limits` = (a, b), radii outside [a, b] have no bin (None); without, the range is the smallest that holds all.
    DataError for more than BINS_AT_MOST bins.
    """
    if limits is None:
        low = math.floor(min(radii) + EDGE)
        limits = (low, max(low + 1, math.ceil(max(radii) - EDGE)))
    low, high = limits
    if high - low > BINS_AT_MOST:
        raise DataError(
            f"radii {low} to {high}: more than {BINS_AT_MOST:,} bins of width 1; give a range by --radii A:B"
        )
    bins: list[int | None] = []
    for radius in radii:
        inside = low - EDGE <= radius <= high + EDGE
        bins.append(min(max(math.floor(radius + EDGE), low), high - 1) if inside else None)
    return bins, limits


def make_units(views: list[ViewRef], batch: int) -> list[Unit]:
    """Chunks of at most `batch` views, bin after bin in the order of the bins, views in the given order."""
    units: list[Unit] = []
    for bin_ in sorted({view.bin for view in views}):
        inside = [view for view in views if view.bin == bin_]
        for start in range(0, len(inside), batch):
            chunk = tuple(inside[start : start + batch])
            units.append(Unit(len(units), chunk, min(max(PICTURES_PER_BIN - start, 0), len(chunk))))
    return units


def thinned(views: list[ViewRef], at_most: int | None) -> list[ViewRef]:
    """At most so many of the views, as evenly over the bins as can be: the first of every bin; None: all of them."""
    if at_most is None or len(views) <= at_most:
        return views
    seen: dict[int, int] = {}
    ranked = []
    for view in views:
        seen[view.bin] = seen.get(view.bin, 0) + 1
        ranked.append((seen[view.bin], view.bin, view.key))
    kept = {key for _, _, key in sorted(ranked)[:at_most]}
    return [view for view in views if view.key in kept]


def pictured(unit: Unit, records: list[ViewRecord]) -> list[int]:
    """Which of a unit's views leave their pictures: the first ones, and those with the largest errors."""
    ranked = sorted(range(len(records)), key=lambda i: -records[i].rank)
    return sorted({*range(unit.pictures), *ranked[:WORST_PER_UNIT]})


def merge_pictures(arrays: dict[str, dict[str, np.ndarray]], units: list[Unit]) -> dict[str, np.ndarray]:
    """key [N], bin [N], and true and rendered [N, H, W, 3] uint8 of the views that were kept, in unit order.

    `arrays`: what every unit left, by its name. There is no `rendered` where nothing was.
    """
    parts: dict[str, list[np.ndarray]] = {"key": [], "bin": [], "true": [], "rendered": []}
    for unit in units:
        for name, array in arrays[unit.name].items():
            parts[name].append(array)
        parts["bin"].append(np.full(len(arrays[unit.name]["key"]), unit.views[0].bin))
    return {name: np.concatenate(values) for name, values in parts.items() if values}
