"""JSON from anyone: bounded in size and depth, finite numbers only, one line for everything that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from sitdist.errors import DataError, SitdistError
from sitdist.io.atomic import write_atomically
from sitdist.io.files import open_file

MAX_BYTES = 256 * 2**20  # a manifest of 10^9 samples in 10^5 shards has 30 MB


def read_json(path: Path, remedy: str, error: type[SitdistError] = DataError) -> dict[str, Any]:
    """The object in a JSON file; `error`, which ends with `remedy`, where there is none."""
    with open_file(path, remedy, MAX_BYTES, error) as file:
        data = file.read()
    return parse_json(data, str(path), remedy, error)


def parse_json(data: bytes | str, where: str, remedy: str, error: type[SitdistError] = DataError) -> dict[str, Any]:
    """The object in JSON text; `error`, which names `where` and ends with `remedy`, for anything else.

    NaN, infinity and numbers beyond float64 are refused.
    """
    try:
        values = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise error(f"{where}: damaged (nested too deeply); {remedy}") from None
    except ValueError as failure:
        raise error(f"{where}: damaged ({' '.join(str(failure).split())[:160]}); {remedy}") from None
    if not isinstance(values, dict):
        raise error(f"{where}: holds {type(values).__name__}, not an object; {remedy}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object atomically; ValueError if a number in it is not finite."""
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text[:20])
    return value
