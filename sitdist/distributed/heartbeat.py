"""Which processes are alive: each one increments a counter in the launcher's store, where the others see it."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two beats
TIMEOUT = 6.0  # seconds without a beat, after which a process counts as dead


class Heartbeat:
    """The heartbeat of this process, on a thread of its own, and those of the others.

    A process that computes or waits keeps beating; one that was killed, or whose machine is gone, does not.
    """

    def __init__(self, rank: int, world: int) -> None:
        """Start beating; the process group must be initialized."""
        self._others = [other for other in range(world) if other != rank]
        self._own, self._stop = str(rank), threading.Event()
        store = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.PrefixStore("sitdist heartbeat", store)
        self._store.set(f"name {rank}", f"process {os.getpid()} on {socket.gethostname()}")
        thread_store = dist.PrefixStore("sitdist heartbeat", store.clone())  # a connection of its own
        self._thread = threading.Thread(target=self._beat, args=(thread_store,), name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self, store: Any) -> None:
        try:
            while True:
                store.add(self._own, 1)
                if self._stop.wait(INTERVAL):
                    return
        except RuntimeError:  # the store's process has ended
            return

    def silent(self) -> list[str]:
        """The other processes without a beat for TIMEOUT seconds, such as "rank 1 (process 7 on node4)".

        If the store itself is gone, nothing more is known.
        """
        try:
            before, deadline = self._counts(self._others), time.monotonic() + TIMEOUT
            waiting = list(self._others)
            while waiting and time.monotonic() < deadline:
                time.sleep(0.2)
                now = self._counts(waiting)
                waiting = [rank for rank in waiting if now[rank] == before[rank]]
            return [f"rank {rank} ({self._name(rank)})" for rank in waiting]
        except RuntimeError:
            return ["the process that keeps the launcher's store (rank 0, where no other does)"]

    def _counts(self, ranks: list[int]) -> dict[int, int]:
        return {rank: int(self._store.add(str(rank), 0)) for rank in ranks}

    def _name(self, rank: int) -> str:
        known = self._store.check([f"name {rank}"])
        return self._store.get(f"name {rank}").decode() if known else "it has not begun"

    def close(self) -> None:
        """Stop beating."""
        self._stop.set()
        self._thread.join(INTERVAL)
