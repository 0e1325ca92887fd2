"""The plain loop that `python -m benchmarks train` times: in this process, or on a CPU in a process of its own.

Settings of the trainer's process, and memory that either side has just freed, would otherwise change the other's times.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.measure import seconds_of
from benchmarks.plain_loop import PlainLoop, random_vae
from sitdist.config.experiment import Config
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ProcessError
from sitdist.flow.interpolant import get_interpolant
from sitdist.model.codec import latent_mean
from sitdist.runs.build import build_endpoint, build_model
from sitdist.train.memory import bytes_held, memory_of_step

PIXELS_A_LATENT = 8  # on a side, of the autoencoder inside the slower baseline


class LocalBaseline:
    """The plain loop on the data and the model of `config`, with an autoencoder of these channels, or none."""

    def __init__(self, config: Config, vae_channels: tuple[int, ...] | None, device: torch.device) -> None:
        data, batch = Path(config.data), config.train.global_batch
        manifest = load_manifest(data)
        torch.manual_seed(config.seed)
        model = build_model(config.model, manifest, build_endpoint(config.flow)).to(device)
        moments, packed_pose = ShardReader(data, "train").moments_and_poses(range(2 * batch))
        samples, vae = latent_mean(moments.float()), None
        if vae_channels is not None:
            vae = random_vae(vae_channels).to(device)
            samples = torch.rand(len(samples), 3, *[PIXELS_A_LATENT * manifest.latent.height] * 2)
        self._loop = PlainLoop(model, get_interpolant(config.flow.path), samples.to(device), packed_pose, batch, vae)

    def memory(self) -> int | None:
        """Bytes of weights, state and the peak of a step; None if the system does not tell."""
        return memory_of_step(self._loop.step, bytes_held(self._loop.model), self._loop.device)

    def seconds(self, steps: int) -> float:
        """Seconds per step, over `steps` of them, after a warm-up step."""
        self._loop.step()
        return seconds_of(lambda: [self._loop.step() for _ in range(steps)], self._loop.device) / steps


class RemoteBaseline:
    """A `LocalBaseline` with these arguments in another process, which is idle between calls."""

    def __init__(self, *given: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads(), *given)
        self._process = context.Process(target=_serve, args=arguments, name="plain loop", daemon=True)
        self._process.start()
        theirs.close()

    def memory(self) -> int | None:
        """See `LocalBaseline`."""
        return cast("int | None", self._ask("memory"))

    def seconds(self, steps: int) -> float:
        """See `LocalBaseline`."""
        return cast("float", self._ask("seconds", steps))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=5)
        self._process.kill()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            self._connection.send((what, arguments))
            return self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise ProcessError(
                f"the plain loop's process ended with exit code {self._process.exitcode}; where nothing is said above, "
                "memory may have run out: a smaller --batch or --model needs less"
            ) from None


def _serve(connection: Connection, threads: int, *given: Any) -> None:
    """Answer the calls of `RemoteBaseline` until it closes the connection."""
    torch.set_num_threads(threads)
    try:
        baseline = LocalBaseline(*given)
        while True:
            what, arguments = connection.recv()
            connection.send(getattr(baseline, what)(*arguments))
    except (EOFError, KeyboardInterrupt):
        return


Baseline = LocalBaseline | RemoteBaseline


@contextmanager
def open_baseline(config: Config, vae_channels: tuple[int, ...] | None, device: torch.device) -> Iterator[Baseline]:
    """The plain loop on `device`: on a GPU in this process, because both sides share its memory."""
    if device.type == "cuda":
        yield LocalBaseline(config, vae_channels, device)
        return
    remote = RemoteBaseline(config, vae_channels, device)
    try:
        yield remote
    finally:
        remote.close()
