"""What an evaluation says of its views: which measures there are, and the rows of its table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sitdist.evaluate.statistics import summarize_all
from sitdist.evaluate.symmetry import Symmetry, symmetry_aware_errors
from sitdist.evaluate.units import EDGE, ViewRecord

RANGES = ((3, 5), (1, 7))  # radii that have a row of their own where every unit bin of them holds views
ROTATIONS = (
    *("rotation_error_deg", "symmetric_rotation_error_deg"),
    *("constant_rotation_error_deg", "nearest_rotation_error_deg"),
)
MEASURES = (
    *ROTATIONS,
    *("translation_error", "translation_share", "symmetric_translation_error"),
    *("constant_translation_error", "nearest_translation_error", "focal_error"),
    *("mae", "psnr", "object_psnr", "ssim", "lpips", "codec_mae", "codec_psnr", "codec_object_psnr", "codec_ssim"),
    "nearest_psnr",
)


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
    columns = {name: [getattr(record, name) for record in records] for name in MEASURES}
    measured = {name: [value for value in values if value is not None] for name, values in columns.items()}
    summaries = summarize_all({name: values for name, values in measured.items() if values}, frozenset(ROTATIONS))
    row: dict[str, Any] = {"name": name, "radius": list(radius), "n": len(records)}
    return row | {name: summary.to_dict() for name, summary in summaries.items()}


def with_symmetries(records: list[ViewRecord], symmetries: list[Symmetry]) -> list[ViewRecord]:
    """The records with their errors up to the objects' symmetries; as they are where there is none."""
    if not symmetries:
        return records
    true, estimated = (_poses([getattr(record, name) for record in records]) for name in ("true", "estimated"))
    labels = torch.tensor([record.label for record in records])
    rotation, translation = symmetry_aware_errors(estimated, true, labels, symmetries)
    return [
        replace(record, symmetric_rotation_error_deg=angle, symmetric_translation_error=distance)
        for record, angle, distance in zip(records, rotation.tolist(), translation.tolist(), strict=True)
    ]


def _poses(rows: list[list[float]]) -> Tensor:
    """[N, 4, 4] float64 from the upper three rows of each, row-major."""
    poses = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    poses[:, :3] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3, 4)
    return poses
