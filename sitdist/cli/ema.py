"""`sitdist ema ACTION`: averages of a run's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import add_overwrite, output, positive, positive_number
from sitdist.cli.outcome import tell
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the commands to the command line."""
    actions = commands.add_parser("ema", help="Averages of a run's weights.").add_actions()
    actions.add_parser(
        "reconstruct",
        help="Compute an average of any width from the snapshots of train.averages.",
        options=_options,
        run=_run,
    )


def _options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("--sigma-rel", type=positive_number, required=True, metavar="S", help="Relative width.")
    command.add_argument("--step", type=positive, help="Step of the average. Default: the last snapshot.")
    command.add_argument(
        "--out", type=output, help="File of the weights, for --set evaluate.average=FILE. Default: in the run's folder."
    )
    add_overwrite(command)


def _run(options: argparse.Namespace) -> None:
    from sitdist.runs.averages import reconstruct_to_file

    tell(reconstruct_to_file(options.run, options.sigma_rel, options.step, options.out, options.overwrite))
