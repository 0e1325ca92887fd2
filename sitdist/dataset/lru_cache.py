"""A cache of the most recent values. Each is made once, even if several threads ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """The `size` most recent values of `make(key)`. An error is raised in every waiting thread and is not cached."""

    def __init__(self, make: Callable[[K], V], size: int) -> None:
        self._make, self._size = make, size
        self._futures: dict[K, Future[V]] = {}  # most recent last
        self._lock = Lock()

    def __call__(self, key: K) -> V:
        with self._lock:
            known = self._futures.pop(key, None)
            future = self._futures[key] = known or Future()
            while len(self._futures) > self._size:
                del self._futures[next(iter(self._futures))]
        if known is None:
            self._fill(key, future)
        return future.result()

    def _fill(self, key: K, future: Future[V]) -> None:
        try:
            future.set_result(self._make(key))
        except BaseException as error:
            with self._lock:
                self._futures.pop(key, None)
            future.set_exception(error)
