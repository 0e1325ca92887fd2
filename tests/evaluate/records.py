"""Records of views that nobody measured."""

from dataclasses import MISSING
from typing import Any

from sitdist.evaluate.measures import ViewRecord


def record(key: str, **values: Any) -> ViewRecord:
    """The record of view `key`: every number is 1 but those in `values`."""
    numbers = {
        field: 1.0
        for field, described in ViewRecord.__dataclass_fields__.items()
        if (described.default is MISSING or "_bar_" in field or field == "trust")
        and field not in ("key", "label", "bin", "lpips", "focal_error", "true", "estimated")
    }
    poses = {"true": [float(i) for i in range(12)], "estimated": [0.0] * 12}
    return ViewRecord(
        **({"key": key, "label": 0, "bin": 1, "lpips": None, "focal_error": None} | numbers | poses | values)
    )
