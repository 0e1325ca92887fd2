"""Batches of the steps to come, read by a few threads while the current one is computed."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from sitdist.data.reader import Batch, BatchReader

log = logging.getLogger(__name__)

STALLED = 30.0  # seconds without a batch after which it is told what is waited for, and again after as many


class Prefetch:
    """Reads the next batches, one for each of `workers` threads; threads suffice, as checking and copying need no GIL.

    `pin` puts them into page-locked memory, for a GPU. Steps from `stop` on are not read ahead.
    """

    def __init__(
        self, reader: BatchReader, rank: int, world: int, stop: int, workers: int = 1, pin: bool = False
    ) -> None:
        self._reader, self._rank, self._world = reader, rank, world
        self._stop, self._workers, self._pin = stop, workers, pin
        self._pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> tuple[Batch, float]:
        """This process's share of the batch of `step`, and the seconds spent waiting for it."""
        begun = time.perf_counter()
        self._forget(keep=range(step, step + self._workers + 1))
        for ahead in (step, *range(step + 1, min(step + self._workers + 1, self._stop))):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._read, ahead)
        pending = self._pending.pop(step)
        while not wait([pending], STALLED).done:
            shards = ", ".join(self._reader.reading()) or "no shard: all threads wait for something else"
            log.warning(
                "rank %d: no data for step %d after %.0f s; it waits for %s",
                *(self._rank, step, time.perf_counter() - begun, shards),
            )
        batch = pending.result()
        return batch, time.perf_counter() - begun

    def _read(self, step: int) -> Batch:
        batch = self._reader.batch(step, self._rank, self._world)
        return batch.pinned() if self._pin else batch

    def _forget(self, keep: range) -> None:
        """Drop what was read ahead for other steps than now come."""
        for step in [step for step in self._pending if step not in keep]:
            self._pending.pop(step).cancel()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
