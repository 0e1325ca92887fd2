"""Writing while training goes on: tensors are copied to the host, and one thread writes the copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch
from torch import Tensor

from sitdist.distributed.threads import helper_threads


class HostCopy:
    """Copies tensors to the host, into reused buffers, which are pinned for tensors of a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def __call__(self, place: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy named tensors; this overwrites the copies of the last call with the same `place`."""
        copies, waits = {}, False
        for name, tensor in tensors:
            buffer = self._buffers.get((place, name))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers[place, name] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            copies[name], waits = buffer, waits or tensor.is_cuda
        if waits:
            torch.cuda.synchronize()
        return copies


class AsyncWriter:
    """Runs one job after the other on a thread of its own, or at once if `asynchronous` is false.

    An error of a job is raised by the next call of any method.
    """

    def __init__(self, asynchronous: bool) -> None:
        self._pool = helper_threads(1, "checkpoints") if asynchronous else None
        self._running: Future[None] | None = None

    @property
    def runs(self) -> bool:
        """Whether a job is running."""
        return self._running is not None and not self._running.done()

    def wait(self) -> None:
        """Wait for the running job."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def check(self) -> None:
        """Raise the error of a job that has finished; waits for nothing."""
        if self._running is not None and self._running.done():
            self.wait()

    def begin(self, job: Callable[[], None]) -> None:
        """Wait for the running job, and begin this one."""
        self.wait()
        if self._pool is None:
            job()
        else:
            self._running = self._pool.submit(job)

    def close(self) -> None:
        """Let the running job finish; its error is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
