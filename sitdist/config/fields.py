"""What a field of a schema takes: command-line options and the reference of keys are derived from it."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

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
