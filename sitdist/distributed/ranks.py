"""Decisions that all processes of a launch take together: broadcast, gather, raise together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator

from sitdist.distributed.heartbeat import Heartbeat
from sitdist.errors import ProcessError, as_told, shortened

COLLECTIVE_ERROR = re.compile(r"gloo|NCCL|c10d|[Cc]onnection (closed|reset)|Broken pipe|[Tt]imed out")


class Ranks:
    """Small collectives over gloo, so that no GPU has to wait for them.

    Every process calls every method. ProcessError if another process has ended, or does not call the method within the
    process group's timeout (half an hour).
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        """The ranks of the accelerator's processes; None: a single process."""
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        self._group: Any = dist.new_group(backend="gloo") if self.world > 1 else None
        self._heartbeat = Heartbeat(self.rank, self.world) if self.world > 1 else None

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Wait for every process at the end of the block; if one raised an error there, all raise it.

        The block itself must not wait for other processes.
        """
        if self.world == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.any(failure is not None)[0]:
            self.raise_first(failure)

    def raise_first(self, failure: Exception | None) -> NoReturn:
        """Raise one process's error on every process; `failure` is the error of this one, if any."""
        error = None if failure is None else as_told(failure)
        bug = failure is not None and error is None
        if bug:
            error = ProcessError(f"{type(failure).__name__}: {shortened(str(failure))}; it says where its traceback is")
        errors = [(rank, each) for rank, each in enumerate(self.gather(error)) if each is not None]
        rank, first = min(errors, key=lambda entry: not isinstance(entry[1], ProcessError))  # bugs before the rest
        if failure is not None and bug:
            raise failure  # the process that met it shows where
        first.of_rank = rank
        raise first from None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on at least one process."""
        return self.begin_any(*flags)()

    def begin_any(self, *flags: bool) -> Callable[[], tuple[bool, ...]]:
        """Begin `any`; call the result for the answer."""
        if self.world == 1:
            return lambda: flags
        raised = torch.tensor(flags, dtype=torch.int32)
        work = self._collective(dist.all_reduce, raised, op=dist.ReduceOp.MAX, async_op=True)

        def answer() -> tuple[bool, ...]:
            self._wait(work.wait)
            return tuple(bool(flag) for flag in raised.tolist())

        return answer

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes of a small tensor, on the CPU."""
        total = values.detach().to("cpu", copy=True)
        if self.world > 1:
            self._collective(dist.all_reduce, total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in rank order."""
        values = [value] * self.world
        if self.world > 1:
            self._collective(dist.all_gather_object, values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value."""
        values = [value]
        if self.world > 1:
            self._collective(dist.broadcast_object_list, values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            self._collective(dist.barrier)

    def _collective(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._wait(partial(function, *arguments, group=self._group, **options))

    def _wait(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except RuntimeError as error:
            self.raise_if_dead(error)
            raise ProcessError(
                f"another process does not answer ({_first_line(error)}); what it printed says why"
            ) from None

    def raise_if_dead(self, error: RuntimeError) -> None:
        """ProcessError that names the processes that have ended, if any; `error` is the collective's."""
        dead = self._heartbeat.silent() if self._heartbeat is not None else []
        if dead:
            raise ProcessError(
                f"{', '.join(dead)} ended or no longer answers, so that this one stops too ({_first_line(error)}); "
                "what it printed says why, and the same command goes on from the last checkpoint"
            ) from None

    def close(self) -> None:
        """After the last collective: stop the heartbeat."""
        if self._heartbeat is not None:
            self._heartbeat.close()


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
