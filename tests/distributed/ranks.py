"""Real processes for tests, started as a launcher would, from a fork server that has already imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from sitdist.cli import main as cli

PRELOADED = [
    *("torch", "torch._dynamo", "torch.utils.tensorboard", "accelerate", "torchmetrics.functional.image"),
    *("deepspeed", "torch.distributed.fsdp", "torchvision.utils", "matplotlib.pyplot", "sitdist.train.trainer"),
    *("sitdist.evaluate.evaluator", "sitdist.build.writer", "sitdist.build.codec_fit"),
    "diffusers.models.autoencoders.autoencoder_kl",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class Ranks:
    """`world` processes that run `function(*arguments)`, each with the environment that torchrun would give it.

    Where one fails the others are killed, as launchers do; what they printed is in `folder`/rank_<i>.err and .out.
    """

    def __init__(self, folder: Path, world: int, function: Callable[..., Any], *arguments: Any, **variables: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self._processes: list[ForkServerProcess] = []
        for rank in range(world):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **variables}
            target = (folder / f"rank_{rank}", environment, function, arguments)
            self._processes.append(_context.Process(target=_run, args=target))
        for process in self._processes:
            process.start()

    def wait(self, timeout: float = 60.0, until: Callable[[], bool] | None = None, grace: float = 2.0) -> list[int]:
        """Wait for the end of all processes, or until `until`; the exit codes (a negative one is a signal's number).

        Once one has failed, the others have `grace` seconds.
        """
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in self._processes):
            if any(process.exitcode for process in self._processes):
                self._give_the_others(grace)
                break
            if until is not None and until():
                return []
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"no end after {timeout:g} s; standard error:\n{self.errors()}")
            wait([process.sentinel for process in self._processes], 0.001 if until else 0.2)
        return self._end()

    def run(self, timeout: float = 60.0) -> None:
        """Wait for the end of all processes, and fail unless every one succeeded."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}; standard error:\n{self.errors()}"

    def send(self, number: signal.Signals, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all processes, or to some."""
        for process in self._processes if ranks is None else [self._processes[rank] for rank in ranks]:
            with suppress(ProcessLookupError):
                if process.pid is not None and process.exitcode is None:
                    os.kill(process.pid, number)

    def pids(self) -> list[int]:
        """The numbers of all processes, by rank."""
        return [int(process.pid or 0) for process in self._processes]

    def kill(self) -> list[int]:
        """SIGKILL whatever still runs; the exit codes."""
        self.send(signal.SIGKILL)
        return self._end()

    def errors(self, rank: int | None = None) -> str:
        """What one process, or all of them, wrote to standard error."""
        return "".join(self.errors_by_rank()) if rank is None else self.errors_by_rank()[rank]

    def errors_by_rank(self) -> list[str]:
        """What each process wrote to standard error."""
        return [(self.folder / f"rank_{rank}.err").read_text() for rank in range(len(self._processes))]

    def _give_the_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(process.exitcode is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.send(signal.SIGKILL)

    def _end(self) -> list[int]:
        for process in self._processes:
            process.join()
        return [int(process.exitcode or 0) for process in self._processes]


def sitdist(folder: Path, world: int, *arguments: object, **variables: str) -> Ranks:
    """`sitdist ARGUMENTS` on `world` processes."""
    return Ranks(folder, world, cli.main, [str(argument) for argument in arguments], **variables)


def settings(*overrides: str) -> list[str]:
    """Overrides of a config as options of a command."""
    return [word for override in overrides for word in ("--set", override)]


def _run(output: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    function(*arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
