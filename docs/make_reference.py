"""Write docs/reference.md: every command with its options, and every key of a config and of a recipe."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sitdist.cli.main import make_parser
from sitdist.cli.parser import Parser
from sitdist.config.experiment import Config
from sitdist.config.recipe import Recipe
from sitdist.config.schema import schemas_in, type_and_bounds

PAGE = Path(__file__).with_name("reference.md")
NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = {"gt": "above {:g}", "ge": "at least {:g}", "lt": "below {:g}", "le": "at most {:g}"}
BOUNDS |= {"multiple_of": "a multiple of {:g}", "pattern": "that matches `{}`"}


def page() -> str:
    """The whole page."""
    lines = [
        "# Reference",
        "",
        "<!-- Written by: python docs/make_reference.py -->",
        "",
        "Every command, every key of an experiment config, and every key of a dataset recipe.",
        "",
        "## Commands",
        "",
        *commands(make_parser(), "sitdist"),
        "## Config",
        "",
        "A key of a nested table is set on the command line as `--set train.steps=100`.",
        "",
        *keys(Config, "", set()),
        "## Recipe",
        "",
        "Sources of views and codecs are chosen by their `kind`.",
        "",
        *keys(Recipe, "", set()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def commands(parser: Parser, name: str) -> Iterator[str]:
    """A heading and a table for every command of a parser."""
    for action in parser.complete()._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for word, inner in action.choices.items():
                if inner._subparsers is None:
                    yield from command(inner, f"{name} {word}", helps[word] or "")
                else:
                    yield from commands(inner, f"{name} {word}")


def command(parser: Parser, name: str, text: str) -> Iterator[str]:
    """A heading and a table of one command's arguments."""
    yield from (f"### `{name}`", "", text, "", "| argument | meaning |", "|---|---|")
    for action in parser.complete()._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        metavar = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest)
        words = " ".join(metavar) if isinstance(metavar, tuple) else metavar
        if action.option_strings:
            value = "" if action.nargs == 0 else f" {words if action.metavar or action.choices else words.upper()}"
            words = f"{action.option_strings[-1]}{value}"
        words += " ..." if action.nargs == "+" else ""
        needed = " Required." if action.required and action.option_strings else ""
        yield row(f"`{words}`", f"{(action.help or '').replace('%%', '%')}{needed}")
    yield ""


def keys(schema: type[BaseModel], place: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    """Tables of a schema's keys and, after it, of those inside it that are not `seen`; `place`: where they stand."""
    seen.add(schema)
    kind = get_args(schema.model_fields["kind"].annotation) if "kind" in schema.model_fields else ()
    of_kind = f", kind {kind[0]}" if len(kind) == 1 else ""
    title = f"`{place}`{of_kind}" if place else f"The {schema.__name__.lower()} itself"
    yield from (f"### {title}", "", " ".join((schema.__doc__ or "").split()), "")
    yield from ("| key | takes | default | meaning |", "|---|---|---|---|")
    for name, field in schema.model_fields.items():
        takes = words(*type_and_bounds(field.annotation, field.metadata))
        yield row(f"`{name}`", takes, default(field.default), field.description or "")
    yield ""
    for name, field in schema.model_fields.items():
        for inner in schemas_in(field.annotation):
            if inner not in seen:
                yield from keys(inner, f"{place}.{name}".removeprefix("."), seen)


def words(kind: Any, bounds: dict[str, Any]) -> str:
    """A type and its bounds in words."""
    origin = get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in get_args(kind))
    if schemas_in(kind):
        return "one per split, see below" if origin is dict else "see below"
    inside = [words(*type_and_bounds(each)) for each in get_args(kind)]
    if origin is list:
        return f"list of: {inside[0]}"
    if origin is tuple:
        return f"list of {len(inside)}: {inside[0]}"
    return ", ".join([NAMES[kind], *(BOUNDS[name].format(value) for name, value in bounds.items())])


def default(value: Any) -> str:
    """A default as YAML writes it."""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool) or value is None:
        return {True: "`true`", False: "`false`", None: "`null`"}[value]
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
