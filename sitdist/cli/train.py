"""`sitdist train CONFIG --out RUN`: train a flow, or resume a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import add_set, output
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser("train", help="Train a flow, or resume a run.", options=_options, run=_run)


def _options(command: Parser) -> None:
    command.add_argument("config", type=Path, help="Experiment config (YAML).")
    command.add_argument("--out", type=output, required=True, help="Folder of the run.")
    command.add_argument(
        "--resume", action="store_true", help="Resume from the newest checkpoint. This is the default."
    )
    add_set(command)


def _run(options: argparse.Namespace) -> None:
    from sitdist.config.experiment import Config
    from sitdist.config.load import load_yaml

    config = load_yaml(Config, options.config, options.set)  # before what is slow to import
    from sitdist.train.trainer import train

    train(config, options.out)
