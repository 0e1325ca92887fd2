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
from sitdist.cli import evaluate, quickstart, scene, shards, train, use
from sitdist.cli.outcome import EXIT_RESUME, check_launcher, exit_code, prepare_output
from sitdist.cli.parser import Parser
from sitdist.errors import RunInterrupted

GROUPS = {
    "shards": "Build and check datasets.",
    "codec": "Make codecs.",
    "scene": "Make scenes from photos, and render them.",
    "checkpoint": "List, verify and convert checkpoints.",
    "ema": "Averages of a run's weights.",
}


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="sitdist", description="Train and evaluate flow models that tie camera poses to pictures.")
    parser.set_defaults(main=run)  # for commands that run others
    parser.add_argument("--version", action="version", version=f"sitdist {__version__}")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for module in (quickstart, shards, scene, train, evaluate, use):
        for words, text, options, command in module.COMMANDS:
            group, _, name = words.rpartition(" ")
            if group not in groups:
                inner = groups[""].add_parser(group, help=GROUPS[group])
                groups[group] = inner.add_subparsers(required=True, metavar="ACTION")
            groups[group].add_parser(name, help=text, options=options, run=command)
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
