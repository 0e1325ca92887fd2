"""Files and folders that are written whole or not at all, and the hash of a file."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sitdist.errors import DataError

PREFIX = ".sitdist-"  # of all temporary names


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, removed afterwards; DataError where it cannot be written."""
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        finally:
            remove(temporary)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, and only then give it its name; DataError."""
    with _beside(path) as temporary:
        write(temporary)
        flush_file(temporary)
        temporary.replace(path)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Like `write_atomically`, for a new folder; DataError if something is at `folder` already."""
    check_free(folder)
    with _beside(folder) as temporary:
        remove_leftovers(folder.parent)
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                flush_file(path)
        temporary.rename(folder)


def check_free(path: Path, overwrite: bool | None = None) -> None:
    """DataError if something is at `path` that may not be replaced: with `overwrite`, a file may.

    None: there is no such option to tell of.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise cannot_write(path, error) from None
    if not (overwrite and path.is_file()):
        remedy = " or --overwrite" if overwrite is not None and path.is_file() else ""
        raise DataError(f"{path}: already exists; give another name{remedy}")


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody uses, and that tells who does: host, process, and a random part."""
    if not path.name:
        raise DataError(f"{path}: no name of a file or folder to write; give one")
    return path.with_name(f"{PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this host were writing in `folder`; what lives or is not ours stays."""
    for left in folder.glob(f"{PREFIX}{_host()}-*-*.tmp"):
        pid = left.name.removeprefix(f"{PREFIX}{_host()}-").split("-")[0]
        if pid.isdigit() and not _lives(int(pid)):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all in it, as far as that is possible; where links lead, nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def cannot_write(path: Path, error: Exception) -> DataError:
    """The one line for a full disk, a missing permission and the like."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        f"{path}: cannot be written ({reason}); free space or name a folder you may write to, "
        "then run the same command again"
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_file(path: Path) -> None:
    """Make the bytes of a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
