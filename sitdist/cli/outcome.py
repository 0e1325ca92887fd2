"""How a command ends: one line on stderr for whatever went wrong, and the exit code."""

from __future__ import annotations

import logging
import os
import select
import sys
import traceback
from contextlib import suppress
from io import TextIOWrapper

from sitdist.errors import (
    SHOW_TRACEBACK,
    ConfigError,
    RunInterrupted,
    as_told,
    one_line,
    save_traceback,
    shortened,
    shown,
)

EXIT_BUG, EXIT_USAGE, EXIT_RESUME, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 75, 130, 141
COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def prepare_output() -> None:
    """Escape what the terminal's encoding does not have; write to nowhere where standard output is closed. Warnings of
    commands that show no log are lines that begin as all others do.
    """
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_OneLine("sitdist: %(message)s"))
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def check_launcher() -> None:
    """ConfigError unless what a launcher says of the processes are whole numbers."""
    for name in COUNTS:
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit() and len(value) < 10):
            raise ConfigError(f"{name} = {shown(value)}: not a whole number; unset it, or start with a launcher")


def tell(text: str) -> None:
    """Print one line, whatever the names in it are."""
    print(one_line(text), flush=True)


def show(table: str) -> None:
    """Print a text of several lines, in which nothing steers a terminal."""
    print("\n".join(map(one_line, table.removesuffix("\n").split("\n"))), flush=True)


def exit_code(error: BaseException) -> int:
    """Tell in one line on stderr what has ended a command; returns its exit code.

    A bug's traceback is saved to a file. SITDIST_TRACEBACK=1 shows every traceback.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, RunInterrupted):  # every process raises it
        return _say(str(error), EXIT_RESUME) if rank == "0" else EXIT_RESUME
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", EXIT_INTERRUPTED)
    if _output_is_closed() and isinstance(error, BrokenPipeError):
        return EXIT_PIPE
    if os.environ.get(SHOW_TRACEBACK):
        with suppress(OSError):
            traceback.print_exception(error)
    told = as_told(error)
    of_rank = getattr(told, "of_rank", None)
    if of_rank is not None and rank != "0":  # all processes raise it, and the main one tells it
        return EXIT_USAGE
    where = rank if of_rank is None else str(of_rank)
    prefix = "error: " if where == "0" else f"error: rank {where}: "
    if told is not None:
        return _say(f"{prefix}{told}", EXIT_USAGE)
    text = shortened(str(error).strip().partition("\n")[0])
    return _say(
        f"{prefix}{type(error).__name__}: {text}; sitdist did not expect this: open an issue in its repository with "
        f"{save_traceback(error)}",
        EXIT_BUG,
    )


def _say(text: str, code: int) -> int:
    with suppress(OSError):
        print(f"sitdist: {shortened(one_line(text), 2000)}", file=sys.stderr, flush=True)
    return code


def _output_is_closed() -> bool:
    """Whether nobody reads standard output or standard error any more; what could not be written is given up."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            closed |= any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
        except (OSError, ValueError):
            closed = True
            with suppress(OSError, ValueError):  # so that it does not fail once more at the end of the process
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed
