"""Regular files from anyone, opened without hanging, and files with a recorded hash."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sitdist.errors import DataError, SitdistError
from sitdist.io.memory import require_memory


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


def read_hashed(path: Path, sha256: str | None, remedy: str, error: type[SitdistError] = DataError) -> bytes:
    """The bytes of a file; `error`, which ends with `remedy`, if they cannot be read, or their SHA-256 is another."""
    with open_file(path, remedy, error=error) as file:
        require_memory(os.fstat(file.fileno()).st_size, str(path), remedy)
        data = file.read()
    found = hashlib.sha256(data).hexdigest() if sha256 is not None else None
    if found != sha256:
        raise error(f"{path}: damaged or altered: SHA-256 is {found}, not {sha256} as recorded; {remedy}")
    return data


def sha256_of(*parts: bytes) -> str:
    """SHA-256 of the hashes of several byte strings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
