"""`sitdist doctor CONFIG`: what a training run will do, and what would stop it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import add_set, output
from sitdist.cli.outcome import EXIT_USAGE, show
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser(
        "doctor", help="Check what a training run will do, and what would stop it.", options=_options, run=_run
    )


def _options(command: Parser) -> None:
    command.add_argument("config", type=Path, help="Experiment config (YAML).")
    command.add_argument(
        "--launch", type=Path, metavar="FILE", help="Accelerate config that the run will be started with."
    )
    command.add_argument("--out", type=output, default=Path("runs"), help="Folder in which the run will be.")
    add_set(command)


def _run(options: argparse.Namespace) -> int:
    from sitdist.train.doctor import doctor

    found = doctor(options.config, options.set, options.launch, options.out)
    if os.environ.get("RANK", "0") == "0":
        show(found.report())
    return EXIT_USAGE if found.wrong else 0
