"""Which folders are ours, and which process writes to one now.

A folder of ours holds a mark, sitdist.json, with its kind. Its only writer holds a lock on sitdist.lock, which the
system releases however the process ends. The file also names the holder and contains a heartbeat, so that machines
whose file system shares no locks see each other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sitdist.errors import DataError
from sitdist.io.atomic import PREFIX, cannot_write
from sitdist.io.files import read_json, write_json

Kind = Literal["run", "evaluation", "dataset", "ablation", "cache"]
MARK, LOCK = "sitdist.json", "sitdist.lock"
FORMAT_VERSION = 1
# Folders of versions that wrote no mark contain all names of one of these sets.
UNMARKED: dict[str, tuple[tuple[str, ...], ...]] = {
    "run": (("config.yaml", "dataset.json", "codec/codec.json"),),
    "evaluation": (
        ("plan.json", "units", "claims"),
        *((f"{name}/plan.json", f"{name}/units") for name in ("turntable", "interpolation", "cycle", "solvers")),
    ),
    "ablation": (("ablation.json", "baseline"),),
    "dataset": (("manifest.json", "codec/codec.json"), ("build.json", "codec/codec.json")),
}
OPTION = {"cache": "reader.cache"}  # the option that names a folder of this kind, if not --out
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
HEARTBEAT = 2.0  # seconds
PATIENCE = 10.0  # seconds without a heartbeat after which a holder on another machine is taken for dead
RECORD_BYTES = 512


def check_ours(folder: Path, kind: Kind) -> bool:
    """Whether `folder` is one of ours; False if it is new or empty. DataError if it is not ours or of another kind."""
    remedy = f"give another {OPTION.get(kind, '--out')}"
    try:
        if not os.path.lexists(folder):
            return False
        if not folder.is_dir():
            raise DataError(f"{folder}: is a file; {remedy}")
        if os.path.lexists(folder / MARK):
            found = read_json(folder / MARK, remedy).get("kind")
            if found != kind:
                shown = found[:40] if isinstance(found, str) else "folder"
                raise DataError(f"{folder}: holds a sitdist {shown}, not a {kind}; {remedy}")
            return True
        if any(all((folder / name).exists() for name in names) for names in UNMARKED.get(kind, ())):
            return True
        if all(entry.name.startswith(PREFIX) for entry in folder.iterdir()):
            return False
        if os.path.lexists(folder / MARK):  # another process has just written it
            return check_ours(folder, kind)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); {remedy}") from None
    raise DataError(f"{folder}: not empty, and no {kind} of sitdist's; {remedy}, or an empty folder")


def mark(folder: Path, kind: Kind, adopt: bool = False) -> bool:
    """Make `folder` ours; return whether it is new. DataError if it is not ours or cannot be written.

    `adopt`: the folder is ours even if it has no mark.
    """
    adopted = adopt and not os.path.lexists(folder / MARK)
    new = not adopted and not check_ours(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    if not (folder / MARK).exists():
        write_json(folder / MARK, {"kind": kind, "format_version": FORMAT_VERSION})
    return new


@contextmanager
def only_writer(folder: Path, kind: Kind) -> Iterator[None]:
    """Make `folder` ours, and this process its only writer.

    DataError, which names the holder, if another process writes there. If the block fails before anything is written,
    a new folder is removed and an empty one is left empty.
    """
    existed = folder.exists()
    handle, new = _open_lock(folder, kind)
    try:
        stop, since = threading.Event(), datetime.now(UTC).isoformat(" ", "seconds")
        _write_record(handle, since, 0)
        heartbeat = threading.Thread(target=_heartbeat, args=(handle, since, stop), name="lock", daemon=True)
        heartbeat.start()
        try:
            yield
        except BaseException:
            if new:
                _unmark(folder, existed)
            raise
        finally:
            stop.set()
            heartbeat.join()
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _open_lock(folder: Path, kind: Kind) -> tuple[int, bool]:
    """The open lock file, locked, and whether the folder is new."""
    new = False
    while True:
        new |= mark(folder, kind)
        path = folder / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError as error:
            raise cannot_write(path, error) from None
        try:
            _take(handle, folder)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)) and (folder / MARK).exists():
                return handle, new
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _unmark(folder: Path, existed: bool) -> None:
    """Remove mark and lock from a folder that holds nothing else, and the folder if it is new."""
    with suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {MARK, LOCK}:
            (folder / MARK).unlink()
            (folder / LOCK).unlink()
            if not existed:
                folder.rmdir()


def _take(handle: int, folder: Path) -> None:
    """Take the lock; DataError if another process holds it."""
    without_locks = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(20):  # a process that has just taken the lock writes its name in the next moment
            if _holder(handle) is not None:
                break
            time.sleep(0.1)
        raise _in_use(folder, _holder(handle)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(folder / LOCK, error) from None
        without_locks = True
    holder = _holder(handle)
    if holder is not None and (without_locks or holder.get("host") != socket.gethostname()):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(0.2)
            if _holder(handle) not in (holder, None):
                raise _in_use(folder, holder)


def _in_use(folder: Path, holder: dict[str, Any] | None) -> DataError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
    return DataError(f"{folder}: in use by {who}; wait until it ends, or give another --out")


def _holder(handle: int) -> dict[str, Any] | None:
    """The process that last took the lock and did not release it."""
    try:
        values = json.loads(os.pread(handle, RECORD_BYTES, 0) or b"null")
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _write_record(handle: int, since: str, count: int) -> None:
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "count": count}
    os.pwrite(handle, json.dumps(record).encode().ljust(RECORD_BYTES), 0)


def _heartbeat(handle: int, since: str, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(HEARTBEAT):
        count += 1
        try:
            _write_record(handle, since, count)
        except OSError:  # a full disk or a lost server: the lock itself still holds
            continue
