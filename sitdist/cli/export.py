"""`sitdist export RUN DIR`: a run as a folder for inference alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sitdist.cli.arguments import output, positive
from sitdist.cli.outcome import tell


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    command = commands.add_parser("export", help="write what inference needs of a run to a folder, with a model card")
    command.add_argument("run", type=Path, help="folder of the run")
    command.add_argument("out", type=output, metavar="DIR", help="new folder, ready to be uploaded to a hub")
    command.add_argument("--step", type=positive, help="the checkpoint to export (default: the newest)")
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    from sitdist.evaluate.report.card import results_markdown
    from sitdist.inference.export import export_run

    loaded = export_run(options.run, options.out, options.step, results_markdown)
    tell(f"{options.out}: {loaded.config.name} after {loaded.step} steps")
