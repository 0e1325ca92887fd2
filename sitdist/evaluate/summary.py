"""The rows of an evaluation's table: summaries of all measures over the views of a bin, a range or an object."""

from __future__ import annotations

from typing import Any

from sitdist.evaluate.measures import MEASURES, ViewRecord
from sitdist.evaluate.statistics import summarize_all
from sitdist.evaluate.units import EDGE

RANGES = ((3, 5), (1, 7))  # radii that have a row of their own where every unit bin of them holds views


def summary_rows(records: list[ViewRecord]) -> list[dict[str, Any]]:
    """The table: a row for every unit bin, one for each of RANGES whose bins all hold views, and one for all views.

    Bins are [a, a + 1), the last one closed. There is no row for all views where another row is all of them.
    """
    bins = sorted({record.bin for record in records})
    rows = [
        _row(f"r in [{a}, {a + 1}{']' if a == bins[-1] else ')'}", (a, a + 1), [r for r in records if r.bin == a])
        for a in bins
    ]
    for a, b in RANGES:
        if all(bin_ in bins for bin_ in range(a, b)):
            inside = [record for record in records if a - EDGE <= record.radius <= b + EDGE]
            rows.append(_row(f"r in [{a}, {b}]", (a, b), inside))
    if not any(row["n"] == len(records) for row in rows):
        rows.append(_row(f"r in [{bins[0]}, {bins[-1] + 1}]", (bins[0], bins[-1] + 1), records))
    return rows


def label_rows(records: list[ViewRecord], names: dict[int, str]) -> list[dict[str, Any]]:
    """A row for every object, by label; none where all views are of one object."""
    labels = sorted({record.label for record in records})
    if len(labels) < 2:
        return []
    bins = [record.bin for record in records]
    radius = (min(bins), max(bins) + 1)
    return [
        _row(names.get(label, f"object {label}"), radius, [record for record in records if record.label == label])
        for label in labels
    ]


def _row(name: str, radius: tuple[int, int], records: list[ViewRecord]) -> dict[str, Any]:
    """Summaries of all that was measured; a view that shows no object has no PSNR on it, and n says so."""
    summaries = summarize_all(MEASURES, {name: [getattr(record, name) for record in records] for name in MEASURES})
    return {"name": name, "radius": list(radius), "n": len(records)} | summaries
