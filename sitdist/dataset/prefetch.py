"""Reads the batches of the next steps in a few threads while the current step is computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch

from sitdist.dataset.batches import Batch, BatchReader
from sitdist.distributed.threads import helper_threads

log = logging.getLogger(__name__)
STALLED = 30.0  # seconds without a batch after which a warning names the shards being read; repeated


class SideStream:
    """Copies batches to a GPU, and prepares them there, on a stream of its own."""

    def __init__(self, device: torch.device, prepare: Callable[[Batch], Batch] | None) -> None:
        self._device, self._stream, self._prepare = device, torch.cuda.Stream(device), prepare

    def copy(self, batch: Batch) -> tuple[Batch, Any]:
        """Start copying the batch to the device; returns it and the event that marks the end of the copy."""
        with torch.cuda.stream(self._stream):
            there = batch.pinned().to(self._device)
            if self._prepare is not None:
                there = self._prepare(there)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return there, copied

    def wait(self, batch: Batch, copied: Any) -> None:
        """Make the current stream wait for the copy, and keep the batch's memory until then."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)
        for tensor in batch.tensors():
            tensor.record_stream(stream)


class Prefetch:
    """Reads the next batches, one for each of `workers` threads. Threads suffice: checking and copying need no GIL.

    If `device` is a GPU, the batches are also copied there, from page-locked memory and on a stream of their own. Steps
    from `stop` on are not read ahead. `prepare`: what is done to each batch in these threads, and on that stream.
    """

    def __init__(
        self,
        reader: BatchReader,
        rank: int,
        world: int,
        stop: int,
        workers: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        prepare: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._reader, self._rank, self._world = reader, rank, world
        self._stop, self._workers = stop, workers
        self._prepare = prepare
        self._side = SideStream(device, prepare) if device.type == "cuda" else None
        self._pool = helper_threads(workers, "prefetch")
        self._pending: dict[int, Future[tuple[Batch, Any]]] = {}

    def batch(self, step: int) -> tuple[Batch, float]:
        """This process's share of the batch of `step`, and the seconds spent waiting for it."""
        begun = time.perf_counter()
        self._drop_others(keep=range(step, step + self._workers + 1))
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
            self._side.wait(batch, copied)
        return batch, time.perf_counter() - begun

    def _read(self, step: int) -> tuple[Batch, Any]:
        """The batch, and on a GPU the event that marks the end of its copy."""
        batch = self._reader.batch(step, self._rank, self._world)
        if self._side is not None:
            return self._side.copy(batch)
        return (batch if self._prepare is None else self._prepare(batch)), None

    def _drop_others(self, keep: range) -> None:
        """Drop batches that were read ahead for other steps."""
        for step in [step for step in self._pending if step not in keep]:
            self._pending.pop(step).cancel()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
