"""The command line: `sitdist COMMAND`, or `python -m sitdist COMMAND` under a launcher.

Commands are thin; what is heavy is imported when a command runs. A user's mistake is one line on stderr and exit code
2, a bug of sitdist one line and exit code 1; a run that was asked to stop, saved everything and can be resumed exits
with 75.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence

from sitdist import __version__
from sitdist.cli import checkpoint, codec, doctor, ema, evaluate, export, pose, render, scene, shards, train, view
from sitdist.cli.outcome import EXIT_RESUME, check_launcher, exit_code, prepare_output
from sitdist.cli.parser import Parser
from sitdist.errors import RunInterrupted

COMMANDS = (shards, codec, scene, train, doctor, checkpoint, evaluate, pose, render, view, export, ema)


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="sitdist", description="Flow models that tie camera poses to pictures: train and evaluate them."
    )
    parser.add_argument("--version", action="version", version=f"sitdist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def run(arguments: Sequence[str] | None = None, parser: Callable[[], Parser] | None = None) -> int:
    """Run a command of the `parser`, by default of sitdist; returns the exit code."""
    try:
        check_launcher()
        options = (parser or make_parser)().parse_args(arguments)
        code = options.command(options) or 0
        sys.stdout.flush()
        return code
    except (Exception, KeyboardInterrupt, RunInterrupted) as error:
        return exit_code(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    prepare_output()
    code = run(arguments)
    if code == EXIT_RESUME:  # launchers pass on what a terminal has already sent: the answer stays the same
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
