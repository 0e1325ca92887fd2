"""Numbers that a caller gives: of the right kind and within bounds, or one line that names them."""

from __future__ import annotations

import math
import operator
from typing import Any

from sitdist.errors import ConfigError, shown

LARGEST = 10**9  # no count, length or scale is larger, so that no product of two of them overflows
LARGEST_SEED = 2**63 - 1


def whole(name: str, value: Any, low: int = 0, high: int = LARGEST) -> int:
    """`value` as an int from `low` to `high`; ConfigError for anything else, also for a bool, a text or 2.0."""
    try:
        found = low - 1 if _is_bool(value) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch and numpy say it so of arrays
        found = low - 1
    if not low <= found <= high:
        raise ConfigError(f"{name} {shown(value)}: expected a whole number from {low} to {high}")
    return found


def number(name: str, value: Any, low: float = -LARGEST, high: float = LARGEST) -> float:
    """`value` as a float from `low` to `high`; ConfigError for anything else, also for a bool, a text or NaN."""
    try:
        found = math.nan if _is_bool(value) or isinstance(value, str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        found = math.nan
    if not low <= found <= high:
        raise ConfigError(f"{name} {shown(value)}: expected a number from {low:g} to {high:g}")
    return found


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
