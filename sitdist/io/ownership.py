"""Which folders are ours to write in, and which process writes in one now.

A folder of ours holds a mark, sitdist.json, that tells its kind. Its only writer holds a lock on sitdist.lock, which
the system releases when the process ends, however it ends. The file also names the holder and counts while it lives,
so that machines whose file system shares no locks see each other.
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
from sitdist.io.json_file import read_json, write_json

Kind = Literal["run", "evaluation", "dataset", "ablation", "cache"]
MARK, LOCK = "sitdist.json", "sitdist.lock"
FORMAT_VERSION = 1
# What folders hold that were written before there was a mark: one of these sets of names.
UNMARKED: dict[str, tuple[tuple[str, ...], ...]] = {
    "run": (("config.yaml", "dataset.json", "codec/codec.json"),),
    "evaluation": (
        ("plan.json", "units", "claims"),
        *((f"{name}/plan.json", f"{name}/units") for name in ("turntable", "interpolation", "cycle", "solvers")),
    ),
    "ablation": (("ablation.json", "baseline"),),
    "dataset": (("manifest.json", "codec/codec.json"), ("build.json", "codec/codec.json")),
}
OPTION = {"cache": "reader.cache"}  # what names a folder of this kind; all others are named by --out
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
BEAT = 2.0  # seconds between two counts of a holder
PATIENCE = 10.0  # seconds without a count, after which a holder on another machine has ended
RECORD_BYTES = 512


def check_ours(folder: Path, kind: Kind) -> bool:
    """Whether `folder` is one of ours; False where it is new or empty. DataError if it is another's, or of another
    kind: nothing may be written there.
    """
    remedy = f"give another {OPTION.get(kind, '--out')}"
    try:
        if not os.path.lexists(folder):
            return False
        if not folder.is_dir():
            raise DataError(f"{folder}: is a file; {remedy}")
        if os.path.lexists(folder / MARK):
            found = read_json(folder / MARK, remedy).get("kind")
            if found != kind:
                raise DataError(f"{folder}: holds a sitdist {_shown(found)}, not a {kind}; {remedy}")
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


def _shown(kind: Any) -> str:
    return str(kind)[:40] if isinstance(kind, str) else "folder"


def mark(folder: Path, kind: Kind, adopt: bool = False) -> bool:
    """Make `folder` ours; whether it was not before. DataError if it is another's or cannot be written.

    `adopt`: the caller knows that it is ours, although it may have no mark.
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
    """Within `with`: `folder` is ours and this process its only writer.

    DataError, which names the holder, if another process writes there. A folder that was new or empty, and in which
    nothing was written when the block ends with an error, is left as it was.
    """
    existed = folder.exists()
    handle, new = _open_lock(folder, kind)
    try:
        stop, since = threading.Event(), datetime.now(UTC).isoformat(" ", "seconds")
        _write_record(handle, since, 0)
        beat = threading.Thread(target=_beat, args=(handle, since, stop), name="lock", daemon=True)
        beat.start()
        try:
            yield
        except BaseException:
            if new:
                _unmark(folder, existed)
            raise
        finally:
            stop.set()
            beat.join()
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _open_lock(folder: Path, kind: Kind) -> tuple[int, bool]:
    """The file of the lock, which is taken, and whether the folder was not ours before."""
    new = False
    while True:
        new |= mark(folder, kind)
        path = folder / LOCK
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another process has left the folder as it was
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
    """Leave a folder in which there is nothing of ours but mark and lock as it was."""
    with suppress(OSError):
        if {entry.name for entry in folder.iterdir()} <= {MARK, LOCK}:
            (folder / MARK).unlink()
            (folder / LOCK).unlink()
            if not existed:
                folder.rmdir()


def _take(handle: int, folder: Path) -> None:
    shared = False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, _holder_named(handle)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise cannot_write(folder / LOCK, error) from None
        shared = True
    holder = _holder(handle)
    if holder is not None and (shared or holder.get("host") != socket.gethostname()):
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
    """Who last took the lock and did not give it back."""
    try:
        values = json.loads(os.pread(handle, RECORD_BYTES, 0) or b"null")
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _holder_named(handle: int) -> dict[str, Any] | None:
    """The same of a lock that is held, whose holder writes its name in the next moment."""
    for _ in range(20):
        holder = _holder(handle)
        if holder is not None:
            return holder
        time.sleep(0.1)
    return None


def _write_record(handle: int, since: str, count: int) -> None:
    record = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "count": count}
    os.pwrite(handle, json.dumps(record).encode().ljust(RECORD_BYTES), 0)


def _beat(handle: int, since: str, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(BEAT):
        count += 1
        try:
            _write_record(handle, since, count)
        except OSError:  # a full disk or a lost server: the lock itself still holds
            continue
