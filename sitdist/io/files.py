"""Files from anyone: opened without hanging, within the memory that there is, with a recorded hash, and JSON."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from sitdist.errors import DataError, OutOfMemoryError, SitdistError
from sitdist.io.atomic import write_atomically

SMALL = 2**27  # bytes that are taken without asking
ROOT = Path("/")
MAX_JSON = 256 * 2**20  # a manifest of 10^9 samples in 10^5 shards has 30 MB


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


# --------------------------------------------------------------------------------------------------------------- memory


def require_memory(need: int, what: str, remedy: str) -> None:
    """OutOfMemoryError if `need` bytes for `what` are more than this process can have; the remedy ends the line.

    Processes of a launcher on one machine share its memory evenly. Nothing is known, and all is allowed, where there
    is no /proc.
    """
    if need < SMALL:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or "1")
    limits = [(free, total // max(1, local)) for free, total in _limits()]
    there = min((min(limit) for limit in limits), default=need)
    if need > there:
        raise OutOfMemoryError(
            f"{what}: about {need / 1e9:,.1f} GB of memory, and {there / 1e9:,.1f} are free; {remedy}"
        )


def _limits() -> Iterator[tuple[int, int]]:
    """What is free and what there is, in bytes, of the machine and of every control group of this process."""
    with suppress(OSError, ValueError, LookupError):
        lines = (ROOT / "proc/meminfo").read_text().splitlines()
        size = {name: 1024 * int(words.split()[0]) for name, _, words in (line.partition(":") for line in lines)}
        yield size["MemAvailable"] + size["SwapFree"], size["MemTotal"] + size["SwapTotal"]
    groups: list[str] = []
    with suppress(OSError):
        groups = (ROOT / "proc/self/cgroup").read_text().splitlines()
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds in ("", "memory"):
            home = ROOT / "sys/fs/cgroup" / kinds
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            inner = home / path.strip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(home):
                    with suppress(OSError, ValueError):  # "max" is no number, and no limit
                        limit, used = (int((folder / name).read_text()) for name in names)
                        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
                        cached = sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))
                        yield limit - used + cached, limit


# ----------------------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, remedy: str, error: type[SitdistError] = DataError) -> dict[str, Any]:
    """The object in a JSON file; `error`, which ends with `remedy`, where there is none."""
    with open_file(path, remedy, MAX_JSON, error) as file:
        data = file.read()
    return parse_json(data, str(path), remedy, error)


def parse_json(data: bytes | str, where: str, remedy: str, error: type[SitdistError] = DataError) -> dict[str, Any]:
    """The object in JSON text; `error`, which names `where` and ends with `remedy`, for anything else.

    NaN, infinity and numbers beyond float64 are refused.
    """
    try:
        values = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise error(f"{where}: damaged (nested too deeply); {remedy}") from None
    except ValueError as failure:
        raise error(f"{where}: damaged ({' '.join(str(failure).split())[:160]}); {remedy}") from None
    if not isinstance(values, dict):
        raise error(f"{where}: holds {type(values).__name__}, not an object; {remedy}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object atomically; ValueError if a number in it is not finite."""
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(text[:20])
    return value
