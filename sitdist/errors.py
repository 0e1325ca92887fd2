"""Errors that a user can cause: one line that names the thing, the value and the remedy."""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import tempfile
import traceback
from typing import Any

from sitdist import __version__

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
OF_THE_DISK = (*FULL, *FORBIDDEN, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # told also where no file is named
SHOW_TRACEBACK = "SITDIST_TRACEBACK"  # set: tracebacks are shown, too
NO_MEMORY = re.compile(
    r"not enough memory|[Oo]ut of memory|(can't|Cannot|cannot|Unable to) allocate|Storage size calculation overflowed|"
    r"multiplication overflow|array is too big"
)


class SitdistError(Exception):
    """Base of every error shown to the user as a single line, without a traceback, with exit code 2.

    `of_rank` is set where every process raises what one of them met: then only the main process shows it.
    """

    of_rank: int | None = None


class ConfigError(SitdistError):
    """A config, a recipe or a command line that cannot be honoured."""


class DataError(SitdistError):
    """A dataset, a shard, an image or a pose that cannot be used."""


class PoseError(SitdistError):
    """A matrix that is not the camera pose it is used as."""


class CodecError(SitdistError):
    """A codec that cannot be loaded, or that disagrees with the dataset."""


class CheckpointError(SitdistError):
    """A checkpoint that is missing, damaged or of another model."""


class NonFiniteError(SitdistError):
    """A loss or a gradient that is not finite."""


class ProcessError(SitdistError):
    """Another process of this command has failed, ended, or does not answer."""


class OutOfMemoryError(SitdistError):
    """More memory than there is."""


class RunInterrupted(BaseException):
    """A signal asked the run to stop; everything is saved and the run can be resumed (exit code 75)."""


def one_line(text: str) -> str:
    """Text for a terminal: control characters, line breaks and what UTF-8 cannot hold are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def shortened(text: str, limit: int = 160) -> str:
    """At most `limit` characters of a text: its beginning and its end."""
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]}...{text[3 - limit // 3 :]}"


def shown(value: Any, limit: int = 160) -> str:
    """A value as Python writes it, shortened; never fails."""
    try:
        return shortened(repr(value).replace("\n", " "), limit)
    except Exception:  # more digits than Python writes, nested too deeply, or a __repr__ that fails
        return f"<{type(value).__name__}>"


def as_told(error: BaseException) -> SitdistError | None:
    """What a user can mend, as one line with its remedy; None for what only a change of the program can.

    Beside SitdistError: errors of the system that name a file or come from a disk, and all that says that memory is
    short, from Python, numpy and torch.
    """
    if isinstance(error, SitdistError):
        return error
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ValueError) and NO_MEMORY.search(text)):
        reason = f" ({shortened(text.strip().splitlines()[0])})" if text.strip() else ""
        return OutOfMemoryError(
            f"not enough memory{reason}; make smaller what is done at once (batch, pictures, views) or the model"
        )
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in OF_THE_DISK):
        return None
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    where = "the disk or the output" if name is None else shortened(os.fsdecode(name), 400)
    remedy = "check the path, or name another"
    if error.errno in FULL:
        remedy = "free space, then run the same command again"
    elif error.errno in FORBIDDEN:
        remedy = "name a place you may use, or change its permissions"
    return DataError(f"{where}: {error.strerror or type(error).__name__}; {remedy}")


def save_traceback(error: BaseException) -> str:
    """Save a traceback to a file that its owner alone can read; what a line says of it."""
    try:
        handle, path = tempfile.mkstemp(prefix="sitdist-", suffix=".txt")  # mode 0600
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            file.write(
                f"sitdist {__version__}, Python {platform.python_version()}, {platform.platform()}\n{sys.argv}\n\n"
            )
            traceback.print_exception(error, file=file)
    except OSError as failure:
        return f"its traceback, which {SHOW_TRACEBACK}=1 shows ({failure.strerror}, so it was not saved)"
    return f"the traceback that was saved in {path}"
