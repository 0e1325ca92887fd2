"""argparse with one-line errors, what the arguments of commands mean, and options that several commands have."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin

from sitdist.checks import LARGEST, LARGEST_SEED
from sitdist.errors import ConfigError, shortened, shown

if TYPE_CHECKING:
    from sitdist.inference.flow import Flow

METAVARS = {"refine": "SCENE", "lpips_backbone": "FILE", "guidance": "S", "zooms": "Z"}
Options = Callable[["Parser"], None]
Run = Callable[[argparse.Namespace], int | None]
Command = tuple[str, str, Options, Run]  # its words, its help, what adds its options, and what runs it


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest right word.

    `options` adds a command's options when the command is chosen, as some of them are slow to derive; `run` runs it.
    """

    def __init__(self, *args: Any, options: Options | None = None, run: Run | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_options = options
        if run is not None:
            self.set_defaults(command=run)

    def complete(self) -> Parser:
        """Add the command's options, if they are not there yet; returns itself."""
        add_options, self._add_options = self._add_options, None
        if add_options is not None:
            add_options(self)
        return self

    def add_argument(self, *names: str, **given: Any) -> argparse.Action:  # type: ignore[override]
        """argparse's, which also tells the default in the help."""
        default = given.get("default")
        if default is not None and default != [] and default is not argparse.SUPPRESS:
            shown = f"{default:g}" if isinstance(default, float) else default
            given["help"] = f"{given.get('help', '')} Default: {shown}.".lstrip()
        return super().add_argument(*names, **given)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        self.complete()
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # here and not in parse_args, so that the command itself knows which options are near
            self.error(f"unrecognized arguments: {rest[0]}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)|invalid choice: '([^']*)'", message)
        if unknown:
            word = unknown[1] or unknown[2]
            known = list(self._option_string_actions)
            for action in self._actions:
                known += [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(word, known, 1, 0.5)
            what = "unknown option" if word.startswith("-") else "unknown"
            remedy = f"did you mean '{near[0]}'?" if near else f"see `{self.prog} --help`"
            message = f"{what} '{word}'; {remedy}"
        raise ConfigError(f"{self.prog}: {shortened(message, 400)}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # of --help and --version, where a closed pipe can still be told
        super().exit(status, message)


# ---------------------------------------------------------------------------------------------------------- arguments


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


def _within(kind: Callable[[str], Any], what: str, low: float, high: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a {what} from {low:g} to {high:g}")
        return value

    return read


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """A whole number from `low` to `high`."""
    return _within(int, "whole number", low, high)


def number(low: float, high: float) -> Callable[[str], float]:
    """A number from `low` to `high`."""
    return _within(float, "number", low, high)


positive = whole(1)
seed = whole(0, LARGEST_SEED)
share = number(0.0, 1.0)
positive_number = number(1.0 / LARGEST, LARGEST)
elevation = number(-90.0, 90.0)  # above the horizon, in degrees


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


def check_there(*paths: Path | None) -> None:
    """OSError for the first path at which nothing is, before anything slow is imported."""
    for path in paths:
        if path is not None:
            os.stat(path)


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
        if get_origin(kind) is list:
            kind, bounds = type_and_bounds(get_args(kind)[0])
            given["nargs"] = "+"
        if get_origin(kind) is Literal:
            given["choices"] = get_args(kind)
        elif kind is int:
            low, high = bounds.get("ge", bounds.get("gt", -1) + 1), bounds.get("le", bounds.get("lt", LARGEST + 1) - 1)
            given |= {"type": whole(low, high), "metavar": "N"}
        elif kind is float:
            given["type"] = number(bounds["ge"], bounds["le"])
        text = str(field.description).replace("%", "%%")
        choices = f" One of {', '.join(given['choices'])}." if "choices" in given else ""
        command.add_argument(f"--{name.replace('_', '-')}", help=f"{text}{choices} Default: the run's config.", **given)


def load_flow(options: argparse.Namespace) -> Flow:
    """The model in the folder `options.run`, its config's `evaluate` changed by the keys that were given as options."""
    from dataclasses import replace

    from sitdist.config.experiment import Config
    from sitdist.config.load import parse
    from sitdist.inference.load import load

    flow = load(options.run, options.device)
    values = flow.run.config.model_dump()
    for name in values["evaluate"]:
        if getattr(options, name, None) is not None:
            values["evaluate"][name] = getattr(options, name)
    flow.run = replace(flow.run, config=parse(Config, values, "options"))
    return flow
