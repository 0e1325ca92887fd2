"""Where a dataset's files are: in a folder, or behind an fsspec URL and then, one by one, in a local cache.

What is fetched is checked against the manifest's hashes, gets its name only when it is whole, and makes room for itself
by removing what has not been used for longest. The processes of a node may share a cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any, Protocol

from sitdist.data.format import load_manifest
from sitdist.errors import ConfigError, DataError
from sitdist.io.atomic import cannot_write, write_atomically

log = logging.getLogger(__name__)

REMOTE = "remote.json"  # in a cache's folder of a dataset: where it comes from
DEFAULT_CACHE = "~/.cache/sitdist"
DEFAULT_LIMIT = 50 * 10**9  # bytes of a cache
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt; twice as long before every further one
PATIENCE = 60.0  # seconds without a byte after which an attempt has failed
IN_USE = 5.0  # seconds for which a file that was asked for stays, whatever the limit
CHUNK = 1 << 20


class Store(Protocol):
    """A dataset's files; `folder` holds manifest.json and codec/, and others as soon as they have been asked for."""

    folder: Path

    def path(self, file: str, sha256: str) -> Path: ...

    def expect(self, files: list[tuple[str, str]]) -> None: ...


def open_store(dataset: str | Path, cache: str | Path | None = None, limit: int = DEFAULT_LIMIT) -> Store:
    """The files of a dataset, given as a folder, as an fsspec URL, or as the folder that a cache keeps of a URL.

    `cache` is a folder (default: DEFAULT_CACHE) for datasets behind URLs, and `limit` its size in bytes.
    """
    if "://" in str(dataset):
        return RemoteStore(str(dataset), Path(cache or DEFAULT_CACHE).expanduser(), limit)
    origin = Path(dataset) / REMOTE
    if origin.is_file():
        return RemoteStore(**(json.loads(origin.read_text()) | {"cache": Path(dataset).parent}))
    return LocalStore(Path(dataset))


class LocalStore:
    """A dataset in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, file: str, sha256: str) -> Path:
        """Where a file is."""
        return self.folder / file

    def expect(self, files: list[tuple[str, str]]) -> None:
        """Let the system read files ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, _ in files:
            with suppress(OSError), (self.folder / file).open("rb") as opened:  # who reads it will say what is wrong
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class RemoteStore:
    """A dataset behind an fsspec URL. Opening it fetches the manifest, by which its folder in the cache is named, and
    the codec; ConfigError for a kind of URL that cannot be read here, DataError if it cannot be fetched.
    """

    def __init__(self, url: str, cache: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.url, self.cache, self.limit = url.rstrip("/"), cache, limit
        self._filesystem, self._root = _filesystem(self.url)
        self.folder = self._fetch_manifest()
        for file, sha256 in load_manifest(self.folder).codec_files.items():
            self.path(f"codec/{file}", sha256)

    def path(self, file: str, sha256: str) -> Path:
        """Where a file is in the cache, fetched if need be; `sha256` is what the manifest says of it."""
        path = self.folder / file
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{self.url}: its manifest names {file}, outside of the dataset; do not use it")
        with suppress(FileNotFoundError):
            os.utime(path)  # the time of last use
            return path
        with _locked(path):
            if not path.exists():  # another process may have fetched it meanwhile
                self._fetch(file, path, sha256)
                self._make_room()
        return path

    def expect(self, files: list[tuple[str, str]]) -> None:
        """Fetch files in the background; what cannot be fetched is told when it is asked for."""
        Thread(target=self._fetch_all, args=(files,), name="fetch", daemon=True).start()

    def _fetch_all(self, files: list[tuple[str, str]]) -> None:
        for file, sha256 in files:
            if not (self.folder / file).exists():
                with suppress(DataError):
                    self.path(file, sha256)

    def _fetch_manifest(self) -> Path:
        """Fetch the manifest into the folder that is named by it and by the URL."""
        fetched = self.cache / "manifest.json"
        with _locked(fetched):
            digest = self._fetch("manifest.json", fetched, None)
            folder = self.cache / hashlib.sha256(f"{self.url} {digest}".encode()).hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            origin = json.dumps({"url": self.url, "limit": self.limit}) + "\n"
            write_atomically(folder / REMOTE, lambda path: path.write_text(origin))
            fetched.replace(folder / "manifest.json")
        return folder

    def _fetch(self, file: str, path: Path, sha256: str | None) -> str:
        """Fetch a file, in at most ATTEMPTS attempts; returns its SHA-256."""
        address = f"{self._root}/{file}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _fetch_once(lambda: self._filesystem.open(address, "rb"), path, sha256)
            except DataError:
                raise
            except Exception as error:  # every protocol has its own
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("%s/%s: attempt %d of %d failed (%s)", self.url, file, attempt, ATTEMPTS, reason)
            if attempt < ATTEMPTS:
                time.sleep(PAUSE * 2 ** (attempt - 1))
        raise DataError(
            f"{self.url}/{file}: cannot be fetched, {ATTEMPTS} attempts failed ({reason}); check the address, the "
            "network and your credentials, or copy the dataset into a folder and give that"
        )

    def _make_room(self) -> None:
        """Remove the shards that have not been used for longest while the cache is larger than its limit."""
        found = []
        for path in self.cache.glob("*/*/*.*"):
            with suppress(FileNotFoundError):  # removed by another process
                if path.suffix in (".tar", ".npz") and not path.name.startswith("."):
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for used, size, path in sorted(found):
            if excess <= 0 or time.time() - used < IN_USE:
                return
            path.unlink(missing_ok=True)  # who has mapped it keeps it until then
            excess -= size


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: cannot be read here ({error}); install fsspec's package for it, such as s3fs or gcsfs, or copy "
            "the dataset into a folder and give that"
        ) from None
    return filesystem, str(root).rstrip("/")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process, and one thread of it, at a time fetches `path`."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise cannot_write(lock, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_once(open_remote: Callable[[], IO[bytes]], path: Path, sha256: str | None) -> str:
    """Copy a remote file to `path`, which gets its name when all is there and has the right SHA-256."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = temporary.open("wb")
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        with target:
            digest = _Copy(open_remote, target).finish()
        if sha256 not in (None, digest):
            raise ValueError(f"SHA-256 {digest[:12]}... but the manifest says {str(sha256)[:12]}...")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


class _Copy(Thread):
    """Copies a remote file into `target`, in a thread of its own, since no protocol promises to return in time."""

    def __init__(self, open_remote: Callable[[], IO[bytes]], target: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._open_remote, self._target = open_remote, target
        self._copied, self._digest = 0, hashlib.sha256()
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            with self._open_remote() as source:
                while chunk := source.read(CHUNK):
                    self._write(chunk)
        except Exception as error:
            self._error = error

    def _write(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        try:
            self._target.write(chunk)
        except OSError as error:
            raise cannot_write(Path(self._target.name), error) from None
        self._copied += len(chunk)

    def finish(self) -> str:
        """Copy everything; returns its SHA-256. TimeoutError if nothing comes for PATIENCE seconds."""
        self.start()
        while self.is_alive():
            before = self._copied
            self.join(PATIENCE)
            if self.is_alive() and self._copied == before:
                raise TimeoutError(f"no byte for {PATIENCE:g} s")
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()
