"""`sitdist checkpoint ACTION`: list, verify and convert checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import output, positive
from sitdist.cli.outcome import EXIT_USAGE, show, tell
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the commands to the command line."""
    actions = commands.add_parser("checkpoint", help="List, verify and convert checkpoints.").add_actions()
    actions.add_parser(
        "list", help="Print size, processes and versions of a run's checkpoints.", options=_run_options, run=_list
    )
    actions.add_parser(
        "verify", help="Read all checkpoints of a run and report what is damaged.", options=_run_options, run=_verify
    )
    actions.add_parser(
        "convert", help="Write a run's weights as one file for other code.", options=_convert_options, run=_convert
    )


def _run_options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")


def _convert_options(command: Parser) -> None:
    command.add_argument("source", type=Path, metavar="RUN", help="Folder of the run, or a file of weights.")
    command.add_argument("out", type=output, metavar="FILE", help="File to write: .safetensors, or .pt for torch.load.")
    command.add_argument(
        "--step", type=positive, metavar="N", help="Step of the checkpoint. Default: the newest whole one."
    )
    command.add_argument("--weights", choices=("ema", "model"), default="ema", help="The average, or the weights.")


def _list(options: argparse.Namespace, verify: bool = False) -> int:
    from sitdist.runs.checkpoint import describe_checkpoints

    text, whole = describe_checkpoints(options.run, verify)
    show(text)
    return 0 if whole else EXIT_USAGE


def _verify(options: argparse.Namespace) -> int:
    return _list(options, verify=True)


def _convert(options: argparse.Namespace) -> None:
    from sitdist.runs.convert import convert

    tell(convert(options.source, options.out, options.step, options.weights))
