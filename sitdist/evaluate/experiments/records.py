"""What each experiment says of one view: a row of its records.csv. None is what was not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, with_config

from sitdist.evaluate.schema import STRICT, Angle, Count, Length, Number, Pose


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
    solver: Literal["one_step", "euler", "midpoint", "heun"]
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
