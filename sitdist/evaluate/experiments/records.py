"""What each experiment says of one view, a row of its records.csv, and of many, a row of its results.json.

None is what was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter, with_config

from sitdist.evaluate.schema import STRICT, Angle, Count, Length, Number, Pose, Text
from sitdist.evaluate.statistics import Summary

Solver = Literal["one_step", "euler", "midpoint", "heun"]


@with_config(STRICT)
@dataclass(frozen=True)
class TurntableRecord:
    """One camera of the circle; `rendered_`: read off the model's own picture."""

    key: str
    true: Pose
    rotation_error_deg: Angle | None = None
    translation_error: Length | None = None
    rendered_rotation_error_deg: Angle | None = None
    rendered_translation_error: Length | None = None
    psnr: Number | None = None
    estimated: Pose | None = None
    rendered_estimated: Pose | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class InterpolationRecord:
    """One step on the way between two cameras."""

    key: str
    method: Literal["slerp", "blend"]
    true: Pose
    psnr_to_last: Number | None = None
    lpips_to_last: Number | None = None
    off_the_way_deg: Angle | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class CycleRecord:
    """One view after one turn."""

    key: str
    turn: Count
    rotation_drift_deg: Angle
    translation_drift: Length
    rotation_step_deg: Angle
    translation_step: Length
    psnr: Number
    psnr_to_last: Number
    estimated: Pose


@with_config(STRICT)
@dataclass(frozen=True)
class SolversRecord:
    """One view by one solver in so many steps."""

    key: str
    task: Literal["pose", "picture"]
    solver: Solver
    steps: Count
    function_evaluations: Count
    ms: Length
    rotation_error_deg: Angle | None = None
    translation_error: Length | None = None
    psnr: Number | None = None


RECORDS: dict[str, TypeAdapter[Any]] = {
    "turntable": TypeAdapter(TurntableRecord),
    "interpolation": TypeAdapter(InterpolationRecord),
    "cycle": TypeAdapter(CycleRecord),
    "solvers": TypeAdapter(SolversRecord),
}

# ---------------------------------------------------------------------------------------------------------- summaries


def _with_interval(summary: Summary) -> Summary:
    if summary.low is None or summary.high is None:
        raise ValueError("no interval of the mean")
    return summary


Bounded = Annotated[Summary, AfterValidator(_with_interval)]


@with_config(STRICT)
@dataclass(frozen=True)
class TurntableRow:
    """All of results.json."""

    experiment: Text
    n: Count
    gif: Text | None = None
    rotation_error_deg: Summary | None = None
    translation_error: Summary | None = None
    rendered_rotation_error_deg: Summary | None = None
    rendered_translation_error: Summary | None = None
    psnr: Summary | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class InterpolationRow:
    """One of `rows`: a method."""

    method: Literal["slerp", "blend"]
    worst_psnr_to_last: Number
    psnr_to_last: Summary | None = None
    lpips_to_last: Summary | None = None
    off_the_way_deg: Summary | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class CycleRow:
    """One of `rows`: a turn."""

    turn: Count
    rotation_drift_deg: Bounded
    translation_drift: Bounded
    rotation_step_deg: Bounded
    translation_step: Bounded
    psnr: Bounded
    psnr_to_last: Bounded


@with_config(STRICT)
@dataclass(frozen=True)
class SolversRow:
    """One of `rows`: a solver with so many steps."""

    task: Literal["pose", "picture"]
    solver: Solver
    steps: Count
    function_evaluations: Count
    ms: Summary
    rotation_error_deg: Summary | None = None
    translation_error: Summary | None = None
    psnr: Summary | None = None


ROWS: dict[str, TypeAdapter[Any]] = {
    "turntable": TypeAdapter(TurntableRow),
    "interpolation": TypeAdapter(InterpolationRow),
    "cycle": TypeAdapter(CycleRow),
    "solvers": TypeAdapter(SolversRow),
}
