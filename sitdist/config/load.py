"""Schemas of dataset recipes and experiment configs, and how a YAML file becomes one.

Every schema is strict: an unknown key, a wrong type or a value out of range is an error that names the key, the value
and what would be right.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sitdist.config.schema import S, Schema, schemas_in
from sitdist.errors import ConfigError, one_line, shortened, shown
from sitdist.io.files import open_file

MAX_BYTES, MAX_DEPTH = 2**18, 32


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, anchors or aliases, no key twice, no more than MAX_DEPTH deep. A date is text."""

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":merge", ":value"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="tags, anchors and aliases are not read; write the value itself", problem_mark=event.start_mark
            )
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem=f"{shown(key)} is no key", problem_mark=mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {shown(key)} is given twice", problem_mark=mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # 1e-4 is a number
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """YAML in which whatever `_Loader` would take for a number or the like is quoted."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file, such as "config"; ConfigError if there is none. Keys and values may be anything."""
    with open_file(path, f"give the path of a YAML {what}", MAX_BYTES, ConfigError) as file:
        data = file.read()
    try:
        values = _parse_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {shortened(' '.join(str(error).split()), 400)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a mapping of keys to values")
    return values


def _parse_yaml(text: str) -> Any:
    """The value of a YAML document; ValueError if there is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def load_yaml(schema: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Read `path` as `schema`, after setting each `a.b=c` of `overrides`; ConfigError if anything does not fit."""
    values = read_yaml(Path(path), schema.__name__.lower())
    for override in overrides or []:
        set_key(values, override)
    return parse(schema, values, str(path))


def set_key(values: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in nested `values`; ConfigError if `override` does not read so."""
    key, equals, text = override.partition("=")
    what = f"--set {shortened(one_line(override))}"
    if not equals or not key:
        raise ConfigError(f"{what}: expected KEY=VALUE, such as --set train.steps=100")
    *parents, last = key.split(".")
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ConfigError(f"{what}: {shown(text)} is not a YAML value") from None
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{what}: {shortened(one_line(parent))} is {shown(inner)}, which has no keys below it")
        values = inner
    values[last] = value


def parse(schema: type[S], values: dict[str, Any], where: str) -> S:
    """Values as `schema`; ConfigError with one line that names the first wrong key, its value and the remedy."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(schema, error)}") from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {shown(error.object)} is not Unicode text; write another") from None


def _explain(schema: type[Schema], error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # it may explain the others
    location = [part for place, part in enumerate(first["loc"]) if place not in _tag_places(first["loc"])]
    key = shortened(".".join(map(str, location))) or schema.__name__
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1, 0.6)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{key}'; {remedy}{rest}"
    if first["type"] == "missing":
        return f"'{key}' is missing; it is required{rest}"
    if first["type"] == "union_tag_invalid":
        tag, tags = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return f"{key}.kind = '{shortened(str(tag))}': should be one of {tags}{rest}"
    message = shortened(first["msg"].removeprefix("Value error, "), 400)
    value = first.get("input")
    told = "" if isinstance(value, dict | Schema) else f" = {shown(value)}"
    return f"{key}{told}: {message[0].lower() + message[1:] if message[1:2].islower() else message}{rest}"


def _tag_places(location: Sequence[Any]) -> set[int]:
    """Where in pydantic's location of an error names of unions' members stand, which are no keys."""
    if location[:1] == ("codec",):
        return {1}
    if location[:1] == ("splits",):
        return {2, 4 if location[2:3] == ("several",) else 3}
    return set()


def _keys_at(schema: type[BaseModel], location: Sequence[Any]) -> set[str]:
    """The keys a schema knows at a place inside it."""
    schemas = [schema]
    for place, part in enumerate(location):
        tagged = [
            choice
            for choice in schemas
            if place in _tag_places(location) and "kind" in choice.model_fields
            if part in get_args(choice.model_fields["kind"].annotation)
        ]
        fields = [choice.model_fields[part] for choice in schemas if part in choice.model_fields]
        schemas = tagged or [inner for field in fields for inner in schemas_in(field.annotation)] or schemas
    return {key for choice in schemas for key in choice.model_fields}


def dump_yaml(value: Schema, defaults: bool = True) -> str:
    """The config as YAML that `load_yaml` reads back to an equal config, with or without what is a default."""
    values = value.model_dump(mode="json", exclude_defaults=not defaults)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=False if defaults else None)
