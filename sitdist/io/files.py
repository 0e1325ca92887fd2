"""Regular files from anyone, opened without hanging, and the memory that is left for what they hold."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sitdist.errors import DataError, SitdistError


@contextmanager
def open_file(
    path: Path, remedy: str, limit: int | None = None, error: type[SitdistError] = DataError
) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    `error`, which ends with `remedy`, for a missing file, a folder, a FIFO or a device (opening one may block), a file
    of more than `limit` bytes, and where reading fails.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise error(f"{path}: is a folder, not a file; {remedy}")
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: is a FIFO, socket or device, not a regular file; {remedy}")
        if limit is not None and status.st_size > limit:
            raise error(f"{path}: {status.st_size:,} bytes, and at most {limit:,} are read; {remedy}")
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as failure:  # ValueError: a null character in the name
        reason = failure.strerror if isinstance(failure, OSError) else failure
        raise error(f"{path}: cannot be read ({reason}); {remedy}") from None
    with file:
        try:
            yield file
        except OSError as failure:
            raise error(f"{path}: cannot be read ({failure.strerror or failure}); {remedy}") from None


def sha256_of(*parts: bytes) -> str:
    """SHA-256 of the hashes of several byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def check_memory(need: int, what: str, remedy: str) -> None:
    """DataError if `what` needs more bytes of memory than are free."""
    free = _free_memory()
    if need > free:
        raise DataError(f"{what}: needs {need / 1e9:.3g} GB of memory and {free / 1e9:.3g} GB are free; {remedy}")


def _free_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
