"""What is said of many views at once: centre, spread, an interval for the mean, and how many views are good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sitdist.errors import DataError
from sitdist.evaluate.measures import EDGE, MEASURES, Count, Measure, Number, Share, ViewRecord

THRESHOLDS = (1, 2, 5, 10, 15, 30)  # degrees, of the shares of views
AUC_DEG = 30.0
RESAMPLES = 1000
CONFIDENCE = 0.95
RESAMPLED_AT_ONCE = 4_000_000  # numbers
AUC_DEFINITION = (
    f"Area under the curve of the share of views with a rotation error below a threshold, for thresholds from 0 to "
    f"{AUC_DEG:g} degrees, over {AUC_DEG:g}: the mean of max(0, 1 - error / {AUC_DEG:g})."
)
INTERVAL_DEFINITION = (
    f"{CONFIDENCE:.0%} interval of the mean by the percentile bootstrap: {RESAMPLES} resamples of the views with "
    "replacement, from a fixed seed."
)


@dataclass(frozen=True)
class Summary:
    """Statistics over exactly `n` views; `low` and `high` bound the mean (INTERVAL_DEFINITION).

    Shares of views below 1 to 30 degrees and AUC_DEFINITION are those of rotation errors only. None: not computed.
    """

    mean: Number
    median: Number
    n: Count
    q25: Number | None = None
    q75: Number | None = None
    low: Number | None = None
    high: Number | None = None
    share_under_1_deg: Share | None = None
    share_under_2_deg: Share | None = None
    share_under_5_deg: Share | None = None
    share_under_10_deg: Share | None = None
    share_under_15_deg: Share | None = None
    share_under_30_deg: Share | None = None
    auc_30_deg: Share | None = None

    def to_dict(self) -> dict[str, float | int]:
        """The fields that apply, for metrics.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def summarize(values: Sequence[float], rotation: bool = False, seed: int = 0) -> Summary:
    """Summary of one number a view; a value that is not finite is a DataError, since no view may drop out of a mean."""
    return summarize_columns({"values": values}, {"values"} if rotation else set(), seed)["values"]


def summarize_all(
    measures: Mapping[str, Measure], columns: Mapping[str, Sequence[float | None]]
) -> dict[str, dict[str, float | int]]:
    """Summaries of measures for a file of results, each over the views that have it; one that none has is left out."""
    measured = {name: [value for value in columns[name] if value is not None] for name in measures}
    rotations = {name for name, measure in measures.items() if measure.rotation}
    summaries = summarize_columns({name: values for name, values in measured.items() if values}, rotations)
    return {name: summary.to_dict() for name, summary in summaries.items()}


def summarize_columns(columns: Mapping[str, Sequence[float]], rotations: set[str], seed: int = 0) -> dict[str, Summary]:
    """Summaries of several numbers of the same views, by name; those in `rotations` are angles in degrees.

    Columns with as many views are resampled together, so that their intervals are of the same views.
    """
    intervals: dict[str, tuple[float, float]] = {}
    for count in {len(values) for values in columns.values()}:
        names = [name for name, values in columns.items() if len(values) == count]
        table = np.stack([_finite(name, columns[name]) for name in names], axis=1)  # [views, columns]
        intervals |= dict(zip(names, _mean_intervals(table, seed), strict=True))
    return {name: _summary(_finite(name, columns[name]), intervals[name], name in rotations) for name in columns}


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    bad = array[~np.isfinite(array)].tolist()
    if bad or not len(array):
        raise DataError(
            f"{name}: {len(bad)} of {len(array)} values are not finite ({bad[:3]}); no mean can be stated over them"
        )
    return array


def _mean_intervals(table: np.ndarray, seed: int) -> list[tuple[float, float]]:
    """The bootstrap interval of every column's mean, of [views, measures]."""
    count = len(table)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, RESAMPLES, at_once := max(1, RESAMPLED_AT_ONCE // count)):
        draws = min(at_once, RESAMPLES - start)
        times = generator.multinomial(count, np.full(count, 1.0 / count), draws)  # [draws, views]
        means.append(times @ table / count)
    edges = np.quantile(np.concatenate(means), [0.5 - 0.5 * CONFIDENCE, 0.5 + 0.5 * CONFIDENCE], axis=0)
    return [(float(low), float(high)) for low, high in edges.T]


def _summary(values: np.ndarray, interval: tuple[float, float], rotation: bool) -> Summary:
    q25, median, q75 = (float(quantile) for quantile in np.quantile(values, [0.25, 0.5, 0.75]))
    angles: dict[str, Any] = {}
    if rotation:
        angles = {f"share_under_{angle}_deg": float((values < angle).mean()) for angle in THRESHOLDS}
        angles["auc_30_deg"] = auc(values)
    return Summary(float(values.mean()), median, len(values), q25, q75, *interval, **angles)


def auc(errors_deg: np.ndarray, limit_deg: float = AUC_DEG) -> float:
    """Exact area under the curve of the share of errors below a threshold, over thresholds in [0, limit], of limit."""
    return float(np.clip(1.0 - errors_deg / limit_deg, 0.0, None).mean())


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
