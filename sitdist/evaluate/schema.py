"""What the numbers and texts of results may be; what is read from disk is held against it, the first fault named."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from sitdist.errors import DataError, one_line
from sitdist.io.files import open_file

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
LARGEST = 1e12
TABLE_BYTES = 2**30  # of records.csv; a million views have less

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Length = Annotated[float, Field(ge=0.0, le=LARGEST)]
Angle = Annotated[float, Field(ge=0.0, le=180.0)]  # degrees
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Pose = Annotated[list[Number], Field(min_length=12, max_length=12)]  # rows of [3, 4]
Text = Annotated[str, Field(max_length=10_000), AfterValidator(one_line)]


def fault(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def damaged(path: Path, reason: object) -> DataError:
    """The one line for results that cannot be used."""
    return DataError(f"{path}: damaged ({' '.join(str(reason).split())[:200]}); run `sitdist eval` again")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a records.csv by the names of its columns, all as text; DataError where there are none."""
    with open_file(path, "run `sitdist eval` again", TABLE_BYTES) as file:
        data = file.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise damaged(path, error) from None
    if not text.endswith("\n"):
        raise damaged(path, "the last line is cut off")
    try:
        head, *lines = csv.reader(io.StringIO(text))
        rows = [dict(zip(head, line, strict=True)) for line in lines]
    except (ValueError, csv.Error) as error:
        raise damaged(path, error) from None
    if not rows:
        raise damaged(path, "no rows")
    return rows


def record_of(row: dict[str, Any], schema: TypeAdapter[Any]) -> Any:
    """A record from texts, those that are empty for what was not measured; ValueError with the first fault."""
    try:
        return schema.validate_python({name: None if text == "" else text for name, text in row.items()}, strict=False)
    except ValidationError as error:
        raise ValueError(fault(error)) from None
