"""What the arguments of the command line mean, and options that several commands have."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from sitdist.checks import LARGEST, LARGEST_SEED
from sitdist.errors import shown

METAVARS = {"refine": "SCENE", "lpips_backbone": "FILE"}

if TYPE_CHECKING:
    from sitdist.flow.sample import SampleOptions
    from sitdist.inference.flow import Flow


def names(text: str) -> list[str]:
    """Names, once each, with commas between them."""
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no list of names; write them once each, such as train,val")
    return names


def output(text: str) -> Path:
    """Where to write; a name in UTF-8, as some of what is written there can have no other."""
    try:
        usable = bool(text.encode())
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no name in UTF-8 for what is written; give another")
    return Path(text)


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """A number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a number from {low:g} to {high:g}")
        return value

    return read


positive = whole(1)
seed = whole(0, LARGEST_SEED)
share = number(0.0, 1.0)
positive_number = number(1.0 / LARGEST, LARGEST)
elevation = number(-90.0, 90.0)  # above the horizon, in degrees


def count(text: str) -> int:
    """A whole number from 1 to 10^12, also as 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 1e12 or value != int(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to 1e12")
    return int(value)


def radii(text: str) -> tuple[int, int]:
    """A range of whole radii, smaller:larger."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no range of whole radii; write smaller:larger, such as 1:7")
    return int(match[1]), int(match[2])


def check_run(run: Path) -> None:
    """CheckpointError unless the folder is there, before anything slow is imported. Several processes look together."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and not os.path.isdir(run):
        from sitdist.runs.checkpoint import no_checkpoint

        raise no_checkpoint(run)


def add_overwrite(command: argparse.ArgumentParser) -> None:
    """Whether an output file may be overwritten."""
    command.add_argument("--overwrite", action="store_true", help="Overwrite the output file if it exists.")


def add_set(command: argparse.ArgumentParser, example: str = "train.steps=100") -> None:
    """Changes to single keys of a config or a recipe."""
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"Change one key, such as {example}."
    )


def add_device(command: argparse.ArgumentParser) -> None:
    """Where a command computes."""
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps, or auto: a GPU if there is one.")


def add_lpips(command: argparse.ArgumentParser) -> None:
    """Weights that LPIPS needs, where they are not a key of the config."""
    command.add_argument("--lpips-backbone", metavar="FILE", help="File of torchvision's AlexNet or VGG weights.")


def add_evaluate_keys(command: argparse.ArgumentParser, *names: str) -> None:
    """Options that override keys of the config's `evaluate`; type, bounds, choices and help are the key's own."""
    from sitdist.config.experiment import EvaluateConfig  # pydantic is slow to import
    from sitdist.config.schema import type_and_bounds

    for name in names:
        field = EvaluateConfig.model_fields[name]
        kind, bounds = type_and_bounds(field.annotation, field.metadata)
        given: dict[str, Any] = {"metavar": METAVARS.get(name, name.upper())}
        if get_origin(kind) is Literal:
            given["choices"] = get_args(kind)
        elif kind is int:
            low, high = bounds.get("ge", bounds.get("gt", -1) + 1), bounds.get("le", bounds.get("lt", LARGEST + 1) - 1)
            given |= {"type": whole(low, high), "metavar": "N"}
        text = str(field.description).replace("%", "%%")
        choices = f" One of {', '.join(given['choices'])}." if "choices" in given else ""
        command.add_argument(f"--{name.replace('_', '-')}", help=f"{text}{choices} Default: the run's config.", **given)


def changes(options: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Those of the options that were given, under other names: `changes(options, steps="estimator_steps")`."""
    values = {name: getattr(options, option) for name, option in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def estimate_arguments(options: argparse.Namespace, flow: Flow) -> dict[str, Any]:
    """The arguments of `Flow.estimate` by the command line, and otherwise by the run's config."""
    from dataclasses import replace

    given = changes(options, estimator="estimator", steps="estimator_steps", readout="readout")
    many = (options.estimator or flow.run.config.evaluate.estimator) == "multi_zoom"
    if many:
        given.pop("estimator", None)
    return {
        "options": replace(flow.estimate_options, **given),
        "zooms": flow.zooms if many else None,
        "scene": options.refine,
    }


def sample_options(options: argparse.Namespace, flow: Flow) -> SampleOptions:
    """How pictures are rendered by the command line, and otherwise by the run's config."""
    from dataclasses import replace

    return replace(flow.sample_options, **changes(options, generator="generator", steps="generator_steps"))
