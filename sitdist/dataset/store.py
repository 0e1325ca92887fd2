"""The files of a dataset: in a folder, or behind an fsspec URL and cached locally, file by file.

A cache is a folder with our mark. It keeps each dataset in a subfolder named by a hash of URL and manifest. A fetched
file is checked against the manifest's hash and gets its name only when it is complete. To stay within its limit, the
cache removes the least recently used shards and indexes, but only files that such a manifest lists. The processes of a
node may share a cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from sitdist.dataset.format import index_name
from sitdist.dataset.manifest import MANIFEST, load_manifest, read_manifest
from sitdist.errors import ConfigError, DataError
from sitdist.io.atomic import PREFIX, cannot_write, file_sha256, remove_leftovers, temporary_name
from sitdist.io.files import MAX_JSON, read_json, write_json
from sitdist.io.ownership import check_ours, mark

if TYPE_CHECKING:
    from sitdist.config.experiment import Config

log = logging.getLogger(__name__)
REMOTE = "remote.json"  # in a cached dataset's folder: its URL, and the cache's limit
DEFAULT_CACHE = "~/.cache/sitdist"
DEFAULT_LIMIT = 50 * 10**9  # bytes of a cache
ATTEMPTS = 5
PAUSE = 0.5  # seconds before the second attempt; doubled for each further one
PATIENCE = 60.0  # seconds without a byte after which an attempt fails
IN_USE = 5.0  # seconds for which a requested file stays, whatever the limit
CHUNK = 1 << 20
LARGEST = 64 * 10**9  # upper bound in bytes for a fetched file, unless the manifest lists a larger shard


class Store(Protocol):
    """The files of a dataset. `folder` holds manifest.json and codec/, and other files once they were requested."""

    folder: Path

    def path(self, file: str, sha256: str) -> Path: ...

    def expect(self, files: list[tuple[str, str]]) -> None: ...


def open_store(dataset: str | Path, cache: str | Path | None = None, limit: int = DEFAULT_LIMIT) -> Store:
    """Open a dataset, given as a folder, as an fsspec URL, or as the folder of a URL in a cache.

    `cache` is the folder for datasets behind URLs (default: DEFAULT_CACHE), and `limit` its size in bytes. DataError
    for a folder that claims to be in a cache and is not.
    """
    if "://" in str(dataset):
        return RemoteStore(str(dataset), Path(cache or DEFAULT_CACHE).expanduser(), limit)
    folder = Path(dataset)
    if os.path.lexists(folder / REMOTE):
        return _reopen(folder.resolve())
    return LocalStore(folder)


def store_of(config: Config, other: str | Path | None = None) -> Store:
    """Open the dataset that a config names, or another one, with the config's cache."""
    return open_store(other or config.data, config.reader.cache, int(config.reader.cache_gb * 1e9))


def _reopen(folder: Path) -> RemoteStore:
    """Open a folder in a cache. The remote.json of a folder elsewhere is not trusted."""
    try:
        origin = _origin(folder) if check_ours(folder.parent, "cache") else None
    except DataError:
        origin = None
    if origin is None:
        raise DataError(
            f"{folder / REMOTE}: only in a cache of sitdist's may a dataset have this file; give the dataset's URL, "
            "or remove the file if the folder holds the whole dataset"
        )
    return RemoteStore(origin.url, folder.parent, origin.limit, folder)


class LocalStore:
    """A dataset in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, file: str, sha256: str) -> Path:
        """The path of a file."""
        return self.folder / file

    def expect(self, files: list[tuple[str, str]]) -> None:
        """Ask the system to read files ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, _ in files:
            path = self.folder / file
            if path.is_file():  # reading it reports what is wrong
                with suppress(OSError), path.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class RemoteStore:
    """A dataset behind an fsspec URL. Opening it fetches the manifest and the codec.

    ConfigError for an unsupported kind of URL, DataError if the files cannot be fetched. `folder`: its folder in the
    cache, to be used without fetching the manifest again.
    """

    def __init__(self, url: str, cache: Path, limit: int = DEFAULT_LIMIT, folder: Path | None = None) -> None:
        self.url, self.cache, self.limit = url.rstrip("/"), cache, limit
        self._filesystem, self._root = _filesystem(self.url)
        self._shard_files: dict[Path, list[Path]] = {}  # of every dataset in the cache
        mark(cache, "cache", adopt=_is_unmarked_cache(cache))
        self.folder = folder or self._fetch_manifest()
        manifest = load_manifest(self.folder)
        self._largest = max([LARGEST, *(shard.bytes for split in manifest.splits.values() for shard in split.shards)])
        for file, sha256 in manifest.codec_files.items():
            self.path(f"codec/{file}", sha256)

    def path(self, file: str, sha256: str) -> Path:
        """The path of a file in the cache, fetched if it is missing; `sha256` is the manifest's."""
        path = self.folder / file
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DataError(f"{path}: leads out of the cache by a link; remove {self.folder}")
        try:
            os.utime(path)  # the time of last use
            return path
        except FileNotFoundError:
            pass
        except OSError:  # another user's
            return path
        with _locked(path):
            if not path.exists():  # another process may have fetched it meanwhile
                self._fetch(file, path, sha256, self._largest)
                self._make_room()
        return path

    def expect(self, files: list[tuple[str, str]]) -> None:
        """Fetch files in the background; errors are raised when a file is requested."""
        Thread(target=self._fetch_all, args=(files,), name="fetch", daemon=True).start()

    def _fetch_all(self, files: list[tuple[str, str]]) -> None:
        for file, sha256 in files:
            if not (self.folder / file).exists():
                with suppress(DataError):
                    self.path(file, sha256)

    def _fetch_manifest(self) -> Path:
        """Fetch the manifest into the folder that is named by its hash and the URL."""
        fetched = temporary_name(self.cache / MANIFEST)
        remove_leftovers(self.cache)
        try:
            digest = self._fetch(MANIFEST, fetched, None, MAX_JSON)
            read_manifest(fetched, f"{self.url}/{MANIFEST}")  # do not keep an unusable one
            folder = self.cache / _folder_name(self.url, digest)
            folder.mkdir(exist_ok=True)
            write_json(folder / REMOTE, {"url": self.url, "limit": self.limit})
            fetched.replace(folder / MANIFEST)
        except OSError as error:
            raise cannot_write(self.cache, error) from None
        finally:
            fetched.unlink(missing_ok=True)
        return folder

    def _fetch(self, file: str, path: Path, sha256: str | None, largest: int) -> str:
        """Fetch a file of at most `largest` bytes in at most ATTEMPTS attempts; return its SHA-256."""
        address = f"{self._root}/{file}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _fetch_once(lambda: self._filesystem.open(address, "rb"), path, sha256, largest)
            except DataError:
                raise
            except OverflowError as error:
                raise DataError(f"{self.url}/{file}: {error}; do not use it") from None
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
        """Remove the least recently used shards while the cache is larger than its limit."""
        found = []
        for path in self._shards_in_cache():
            with suppress(FileNotFoundError):  # not fetched, or removed by another process
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) and not path.parent.is_symlink():
                    found.append((status.st_mtime, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit
        for used, size, path in sorted(found):
            if excess <= 0 or time.time() - used < IN_USE:
                return
            path.unlink(missing_ok=True)  # processes that have mapped it keep it
            excess -= size

    def _shards_in_cache(self) -> Iterator[Path]:
        """The paths of the shards and indexes that the manifests in the cache list."""
        for folder in self.cache.iterdir():
            if folder not in self._shard_files and _origin(folder) is not None:
                with suppress(DataError):  # of a newer format
                    splits = load_manifest(folder).splits
                    tars = [folder / name / shard.name for name, split in splits.items() for shard in split.shards]
                    self._shard_files[folder] = [*tars, *(tar.with_name(index_name(tar.name)) for tar in tars)]
            yield from self._shard_files.get(folder, ())


class _Origin(BaseModel):
    """remote.json."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: str
    limit: int = Field(ge=0)


def _folder_name(url: str, digest: str) -> str:
    """The name in a cache of the dataset at `url` whose manifest has the SHA-256 `digest`."""
    return hashlib.sha256(f"{url} {digest}".encode()).hexdigest()[:16]


def _origin(folder: Path) -> _Origin | None:
    """The origin of a dataset in a subfolder of a cache; None unless the name of the folder proves it."""
    manifest = folder / MANIFEST
    if not re.fullmatch("[0-9a-f]{16}", folder.name) or folder.is_symlink() or not manifest.is_file():
        return None
    try:
        origin = _Origin.model_validate(read_json(folder / REMOTE, ""))
        return origin if folder.name == _folder_name(origin.url, file_sha256(manifest)) else None
    except (DataError, OSError, ValueError):
        return None


def _is_unmarked_cache(cache: Path) -> bool:
    """Whether a folder without a mark is a cache of an older version, by its place or by its contents."""
    if cache == Path(DEFAULT_CACHE).expanduser():
        return True
    names = (f".{MANIFEST}.lock", f".{MANIFEST}.tmp", MANIFEST)
    try:
        return all(
            path.name in names or path.name.startswith(PREFIX) or _origin(path) is not None for path in cache.iterdir()
        )
    except OSError:
        return False


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
    """Let only one process, and one thread of it, fetch `path` at a time."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise cannot_write(lock, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _fetch_once(open_remote: Callable[[], IO[bytes]], path: Path, sha256: str | None, largest: int) -> str:
    """Copy a remote file to `path`; the file gets its name when it is complete and has the right SHA-256."""
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        target = temporary.open("wb")
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        with target:
            digest = _Copy(open_remote, target, largest).finish()
        if sha256 not in (None, digest):
            raise ValueError(f"SHA-256 {digest[:12]}... but the manifest says {str(sha256)[:12]}...")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


class _Copy(Thread):
    """Copies a remote file into `target`, in a thread of its own because a protocol may block forever."""

    def __init__(self, open_remote: Callable[[], IO[bytes]], target: IO[bytes], largest: int) -> None:
        super().__init__(daemon=True)
        self._open_remote, self._target, self._largest = open_remote, target, largest
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
        if self._copied + len(chunk) > self._largest:
            raise OverflowError(f"more than {self._largest:,} bytes")
        try:
            self._target.write(chunk)
        except OSError as error:
            raise cannot_write(Path(self._target.name), error) from None
        self._copied += len(chunk)

    def finish(self) -> str:
        """Copy everything and return its SHA-256. TimeoutError if nothing arrives for PATIENCE seconds."""
        self.start()
        while self.is_alive():
            before = self._copied
            self.join(PATIENCE)
            if self.is_alive() and self._copied == before:
                raise TimeoutError(f"no byte for {PATIENCE:g} s")
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()
