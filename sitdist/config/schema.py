"""Field types of recipes and configs, the strict schema that they share, and what a field of a schema takes."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Positive = Annotated[int, Field(gt=0, le=10**9)]  # so that no product of two counts overflows
NonNegative = Annotated[int, Field(ge=0, le=10**9)]
Steps = Annotated[int, Field(gt=0, le=10**6)]  # of a solver; in float32 their times differ
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Label = Annotated[int, Field(ge=0, lt=10**6)]
Title = Annotated[str, Field(min_length=1, max_length=1000)]
Pixels = Annotated[int, Field(gt=0, le=16384)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e9)]
NonNegativeNumber = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _name(text: str) -> str:
    """A text that can be a path or a name."""
    if "\0" in text:
        raise ValueError("holds a NUL, which no name can have; write another")
    return text


Word = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_name)]

# YAML has lists, no tuples: these take a list, whose items are as strict as all others.
RadiusRange = Annotated[tuple[PositiveNumber, PositiveNumber], Field(strict=False)]
Colour = Annotated[tuple[Share, Share, Share], Field(strict=False)]
Elevation = Annotated[float, Field(ge=-90.0, le=90.0)]
ElevationRange = Annotated[tuple[Elevation, Elevation], Field(strict=False)]
Azimuth = Annotated[float, Field(ge=-360.0, le=360.0)]
AzimuthRange = Annotated[tuple[Azimuth, Azimuth], Field(strict=False)]
Fov = Annotated[float, Field(gt=1.0, lt=170.0)]
FovRange = Annotated[tuple[Fov, Fov], Field(strict=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


class Schema(BaseModel):
    """Base of all schemas: unknown keys and other types are refused, numbers are finite, assignments are checked."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True)


S = TypeVar("S", bound=Schema)
BOUNDS = ("gt", "ge", "lt", "le", "multiple_of", "pattern")


def type_and_bounds(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, dict[str, Any]]:
    """A field's type without None, and its bounds by pydantic's names for them, such as {"gt": 0, "le": 100}."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        more = [each for one in more for each in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return type_and_bounds(inner, [*metadata, *more])
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not types.NoneType]
        if len(kinds) == 1:
            return type_and_bounds(kinds[0], metadata)
    bounds = {name: getattr(each, name) for each in metadata for name in BOUNDS if hasattr(each, name)}
    return annotation, bounds


def schemas_in(annotation: Any) -> list[type[BaseModel]]:
    """Every schema in an annotation, once."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [schema for argument in get_args(annotation) for schema in schemas_in(argument)]
    return list(dict.fromkeys(found))
