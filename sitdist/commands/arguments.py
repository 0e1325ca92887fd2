"""What words of the command line mean; argparse shows what is wrong with one."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

ESTIMATORS = ("one_step", "euler", "heun", "midpoint", "source", "exact", "renoised", "draws", "multi_zoom")
READOUTS = ("svd", "weighted", "look_at")

if TYPE_CHECKING:
    from sitdist.api import Flow
    from sitdist.flow.sample import SampleOptions


def names(text: str) -> list[str]:
    """Names, once each, with commas between them."""
    names = text.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of names; write them once each, such as train,val")
    return names


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 to 1")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return value


def positive_number(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def elevation(text: str) -> float:
    """An angle above the horizon, in degrees."""
    try:
        value = float(text)
    except ValueError:
        value = 91.0
    if not -90.0 <= value <= 90.0:
        raise argparse.ArgumentTypeError(f"'{text}' is not an angle from -90 to 90")
    return value


def count(text: str) -> int:
    """A positive whole number, also as 1e9."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive whole number")
    return int(value)


def radii(text: str) -> tuple[int, int]:
    """A range of whole radii, smaller:larger."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is no range of whole radii; write smaller:larger, such as 1:7")
    return int(match[1]), int(match[2])


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
