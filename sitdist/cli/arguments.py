"""What words of the command line mean; argparse shows what is wrong with one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitdist.checks import LARGEST, LARGEST_SEED
from sitdist.errors import shown
from sitdist.flow.choices import ESTIMATORS, READOUTS

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


def add_device(command: argparse.ArgumentParser) -> None:
    """Where a command computes."""
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)"
    )


def add_estimator(command: argparse.ArgumentParser) -> None:
    """How poses are read off pictures; `estimate_arguments` reads it."""
    command.add_argument("--estimator", choices=ESTIMATORS, help="(default: as the run's config says)")
    command.add_argument("--estimator-steps", type=positive, metavar="N", help="(default: as the run's config says)")
    command.add_argument("--readout", choices=READOUTS, help="(default: as the run's config says)")
    command.add_argument("--refine", metavar="SCENE", help="move poses to where this scene (or built-in) shows them")


def estimate_arguments(options: argparse.Namespace, flow: Flow) -> dict[str, Any]:
    """The arguments of `Flow.estimate` by the command line, and otherwise by the run's config."""
    from dataclasses import replace

    estimator = options.estimator or flow.run.config.evaluate.estimator
    many = estimator == "multi_zoom"
    given = {
        "estimator": None if many else options.estimator,
        "steps": options.estimator_steps,
        "readout": options.readout,
    }
    return {
        "options": replace(
            flow.estimate_options, **{name: value for name, value in given.items() if value is not None}
        ),
        "zooms": flow.zooms if many else None,
        "scene": options.refine,
    }


def add_generator(command: argparse.ArgumentParser) -> None:
    """How pictures are rendered; `sample_options` reads it."""
    command.add_argument("--generator", metavar="SOLVER", help="(default: as the run's config says)")
    command.add_argument("--generator-steps", type=positive, metavar="N", help="(default: as the run's config says)")


def sample_options(options: argparse.Namespace, flow: Flow) -> SampleOptions:
    """As the command line says, and otherwise as the run's config does."""
    from dataclasses import replace

    given = {"generator": options.generator, "steps": options.generator_steps}
    return replace(flow.sample_options, **{name: value for name, value in given.items() if value is not None})
