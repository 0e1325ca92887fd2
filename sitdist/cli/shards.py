"""`sitdist shards ACTION`: build and check datasets."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import add_overwrite, add_set, names, output
from sitdist.cli.outcome import show, tell
from sitdist.cli.parser import Parser
from sitdist.errors import DataError, one_line


def add(commands: Any) -> None:
    """Add the commands to the command line."""
    actions = commands.add_parser("shards", help="Build and check datasets.").add_actions()
    actions.add_parser(
        "build",
        help="Render or load views, encode them, and pack them into shards.",
        options=_build_options,
        run=_build,
    )
    actions.add_parser(
        "cameras", help="Write the cameras of a split for nerfstudio to render.", options=_cameras_options, run=_cameras
    )
    actions.add_parser(
        "verify", help="Read a whole dataset and report what is damaged.", options=_dataset_options, run=_verify
    )
    actions.add_parser("info", help="Print what a dataset holds.", options=_dataset_options, run=_info)


def _build_options(command: Parser) -> None:
    command.add_argument("recipe", type=Path, help="Dataset recipe (YAML).")
    command.add_argument("--out", type=output, required=True, help="Folder of the dataset.")
    command.add_argument(
        "--splits", type=names, metavar="A,B", help="Build only these splits; train is one of them. Default: all."
    )
    add_set(command, "image_size=64")


def _cameras_options(command: Parser) -> None:
    command.add_argument("recipe", type=Path, help="Dataset recipe (YAML).")
    command.add_argument("--split", required=True, help="Split of the recipe.")
    command.add_argument("--out", type=output, required=True, help="Camera path to write (JSON).")
    command.add_argument(
        "--transforms",
        type=output,
        metavar="FILE",
        help="Also write a transforms.json for the pictures 00000.png, 00001.png, and so on.",
    )
    add_overwrite(command)
    add_set(command, "image_size=64")


def _dataset_options(command: Parser) -> None:
    command.add_argument("dataset", help="Folder or fsspec URL of the dataset.")


def _build(options: argparse.Namespace) -> None:
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)  # before what is slow to import
    from sitdist.build.writer import build
    from sitdist.dataset.info import info
    from sitdist.distributed.accelerator import processes

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        build(recipe, options.out, options.splits)
    else:
        with processes() as (_, ranks):
            build(recipe, options.out, options.splits, ranks)
    if os.environ.get("RANK", "0") == "0":
        show(info(options.out))


def _cameras(options: argparse.Namespace) -> None:
    from sitdist.build.camera_path import write_camera_path
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    recipe = load_yaml(Recipe, options.recipe, options.set)
    count = write_camera_path(recipe, options.split, options.out, options.transforms, options.overwrite)
    tell(f"{options.out}: {count} cameras of {options.split}")


def _verify(options: argparse.Namespace) -> None:
    from sitdist.dataset.info import info
    from sitdist.dataset.verify import verify

    problems = verify(options.dataset)
    for problem in problems[1:]:
        print(one_line(problem), file=sys.stderr)
    if problems:
        more = f" (and {len(problems) - 1} more, above)" if len(problems) > 1 else ""
        raise DataError(f"{options.dataset}: {problems[0]}{more}")
    show(info(options.dataset))
    show("verified: every sample and every hash is right")


def _info(options: argparse.Namespace) -> None:
    from sitdist.dataset.info import info

    show(info(options.dataset))
