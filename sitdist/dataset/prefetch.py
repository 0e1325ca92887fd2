"""Batches of the steps to come, read by a few threads while the current one is computed."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, wait
from typing import Any

import torch

from sitdist.dataset.batches import Batch, BatchReader
from sitdist.distributed.threads import helper_threads

log = logging.getLogger(__name__)
STALLED = 30.0  # seconds without a batch after which it is told what is waited for, and again after as many


class SideStream:
    """Copies batches to a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def bring(self, batch: Batch) -> tuple[Batch, Any]:
        """The batch on the device, as soon as the event that is returned has happened; waits for nothing."""
        with torch.cuda.stream(self._stream):
            there = batch.pinned().to(self._device)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return there, copied

    def hand_over(self, batch: Batch, copied: Any) -> None:
        """Let what is computed from now on wait for the batch, on the device, and keep its memory until then."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for tensor in (batch.moments, batch.packed_pose, batch.label, batch.positions):
            tensor.record_stream(stream)


class Prefetch:
    """Reads the next batches, one for each of `workers` threads; threads suffice, as checking and copying need no GIL.

    On a GPU, `device`, they are there already: copied from page-locked memory on a stream of their own, beside the
    step that is computed. Steps from `stop` on are not read ahead.
    """

    def __init__(
        self,
        reader: BatchReader,
        rank: int,
        world: int,
        stop: int,
        workers: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self._reader, self._rank, self._world = reader, rank, world
        self._stop, self._workers = stop, workers
        self._side = SideStream(device) if device.type == "cuda" else None
        self._pool = helper_threads(workers, "prefetch")
        self._pending: dict[int, Future[tuple[Batch, Any]]] = {}

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
        batch, copied = pending.result()
        if self._side is not None:
            self._side.hand_over(batch, copied)
        return batch, time.perf_counter() - begun

    def _read(self, step: int) -> tuple[Batch, Any]:
        """The batch, and on a GPU the event of its being there."""
        batch = self._reader.batch(step, self._rank, self._world)
        return (batch, None) if self._side is None else self._side.bring(batch)

    def _forget(self, keep: range) -> None:
        """Drop what was read ahead for other steps than now come."""
        for step in [step for step in self._pending if step not in keep]:
            self._pending.pop(step).cancel()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
