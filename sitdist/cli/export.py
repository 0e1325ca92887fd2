"""`sitdist export RUN DIR`: a run as a folder for inference alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import check_run, output, positive
from sitdist.cli.outcome import tell
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser(
        "export", help="Write what inference needs of a run to a folder, with a model card.", options=_options, run=_run
    )


def _options(command: Parser) -> None:
    command.add_argument("run", type=Path, help="Folder of the run.")
    command.add_argument("out", type=output, metavar="DIR", help="New folder, ready to be uploaded to a hub.")
    command.add_argument("--step", type=positive, help="Step of the checkpoint. Default: the newest.")


def _run(options: argparse.Namespace) -> None:
    check_run(options.run)
    from sitdist.evaluate.report.card import results_markdown
    from sitdist.inference.export import export_run

    loaded = export_run(options.run, options.out, options.step, results_markdown)
    tell(f"{options.out}: {loaded.config.name} after {loaded.step} steps")
