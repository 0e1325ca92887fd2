"""The state of a run: saved while training goes on, resumed, and rolled back to an earlier checkpoint."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import sitdist
from sitdist.config.experiment import Config
from sitdist.distributed.ddp import DDP
from sitdist.distributed.optimizer_state import check_optimizer
from sitdist.distributed.ranks import Ranks
from sitdist.errors import CheckpointError, ConfigError
from sitdist.model.sit import SiT
from sitdist.runs import averages as posthoc_ema
from sitdist.runs import checkpoint as checkpoints
from sitdist.train.async_writer import AsyncWriter, HostCopy
from sitdist.train.ema import Ema
from sitdist.train.guard import Guard
from sitdist.train.hooks import Hook, StepResult
from sitdist.train.monitor import Monitor

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]


@dataclass
class TrainState:
    """What training changes: each process holds it whole, or its shard, as the backend says."""

    model: SiT
    ema: Ema
    averages: posthoc_ema.Averages | None
    backend: DDP
    guard: Guard
    step: int = 0  # updates so far

    def tensors(self) -> dict[str, Iterator[tuple[str, Tensor]]]:
        """The full tensors of each file of a checkpoint; every process iterates over all of them, in order."""
        return {
            "model": self.backend.full_tensors(self.model),
            "ema": self.backend.full_tensors(self.ema.model),
            "optimizer": self.backend.full_optimizer(),
        }

    def load_weights(self, run: Path, loaded: checkpoints.Checkpoint) -> None:
        """Take the weights, their averages and the optimizer's state from a checkpoint of `run`, but not its step."""
        tensors, folder = loaded.tensors, loaded.folder
        checkpoints.check_tensors(self.model, tensors["model"], folder / "model.safetensors")
        checkpoints.check_tensors(self.ema.model, tensors["ema"], folder / "ema.safetensors")
        parameters = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        optimizer = check_optimizer(parameters, tensors["optimizer"], folder / "optimizer.safetensors")
        self.backend.load(self.model, tensors["model"])
        self.backend.load(self.ema.model, tensors["ema"])
        self.backend.load_optimizer(optimizer)
        if self.averages is not None:
            self.averages.load(posthoc_ema.path_of(run, loaded.step))

    def resume(self, run: Path, loaded: checkpoints.Checkpoint, accelerator: Accelerator, steps: int) -> None:
        """Take everything from a checkpoint of `run`, which trains for `steps` steps."""
        self.load_weights(run, loaded)
        self.step = loaded.step
        self.guard.load(loaded.state.get("left_out", self.guard.state()))
        if accelerator.scaler is not None and loaded.state["scaler"] is not None:
            accelerator.scaler.load_state_dict(loaded.state["scaler"])
        before, now = loaded.state.get("precision"), accelerator.mixed_precision
        if before not in (None, now):
            log.warning(
                "%s was trained in %s and this device goes on in %s: the rest differs in rounding",
                *(loaded.folder, before.replace("no", "fp32"), now.replace("no", "fp32")),
            )
        if self.step == steps:
            log.info("%s: finished, all %d steps are trained; train.steps set higher goes on", run, self.step)
        else:
            log.info("going on from %s", loaded.folder)


def check_resumable(loaded: checkpoints.Checkpoint, config: Config, dataset: Path, fingerprint: str) -> None:
    """ConfigError or CheckpointError unless a run of `config` on this dataset may continue from the checkpoint."""
    checkpoints.check_same_config(loaded, config)
    checkpoints.check_same_dataset(loaded, dataset, fingerprint)
    if loaded.step > config.train.steps:
        raise ConfigError(
            f"train.steps = {config.train.steps}: {loaded.folder} has already seen {loaded.step}; set it higher"
        )


def find_newest(run: Path) -> checkpoints.Checkpoint | None:
    """The checkpoint to resume from, or None to start at step 0; the main process calls it."""
    newest = checkpoints.read_newest(run)
    if newest is None and any((run / "checkpoints").glob("step_*")):
        raise CheckpointError(
            f"{run / 'checkpoints'}: no checkpoint in it is whole; put one back, or start another run with "
            "another --out"
        )
    return newest


class Saver(Hook):
    """Saves `state` at the config's intervals: the main process writes, and every process calls every method."""

    def __init__(
        self,
        run: Path,
        config: Config,
        fingerprint: str,
        state: TrainState,
        accelerator: Accelerator,
        ranks: Ranks,
        monitor: Monitor,
    ) -> None:
        self._run, self._config, self._fingerprint = run, config, fingerprint
        self._state, self._accelerator, self._ranks, self._monitor = state, accelerator, ranks, monitor
        self._saved_step = state.step  # of the checkpoint that the run resumed from
        self._host_copy = HostCopy()
        self.writer = AsyncWriter(config.train.checkpoint_async)

    def after_step(self, done: StepResult) -> None:
        if self._is_snapshot() and self._state.averages is not None:
            write = partial(self._write_averages, done.step)
            self._begin_writing(write, {"averages": self._state.averages.tensors()})
        if done.is_last or done.due(self._config.train.checkpoint_every):
            self.save()

    def save(self) -> None:
        """Copy everything that a checkpoint holds, and begin to write it."""
        state = self._state
        if self._saved_step == state.step:
            return
        begun = time.perf_counter()
        state.guard.read()
        tensors = state.tensors()
        if state.averages is not None and not self._is_snapshot():  # those of a snapshot are being written
            tensors["averages"] = state.averages.tensors()
        self._begin_writing(partial(self._write_checkpoint, self._metadata()), tensors)
        self._saved_step = state.step
        self._monitor.observe_checkpoint(time.perf_counter() - begun)

    def finish(self) -> None:
        """Wait until everything is on disk."""
        with self._ranks.raise_together():
            self.writer.wait()

    def roll_back(self, before: int) -> int | None:
        """Load the weights of the newest checkpoint of fewer than `before` updates; returns its step, None if none.

        Only a checkpoint at the config's interval counts, so that a run that was stopped ends like one that was not.
        """
        every, found = self._config.train.checkpoint_every, None
        with self._ranks.raise_together():
            self.writer.wait()
            if self._accelerator.is_main_process and every is not None:
                steps = map(checkpoints.step_of, checkpoints.list_checkpoints(self._run))
                found = max((step for step in steps if step < before and step % every == 0), default=None)
        target = self._ranks.broadcast(found)
        if target is not None:
            with self._ranks.raise_together():
                loaded = checkpoints.read_checkpoint(checkpoints.folder_of(self._run, target))
                self._state.load_weights(self._run, loaded)
        return target

    def close(self) -> None:
        self.writer.close()

    def _is_snapshot(self) -> bool:
        """Whether the averages of this step are kept for good."""
        averages = self._config.train.averages
        every = None if averages is None else averages.snapshot_every
        return every is not None and self._state.step % every == 0

    def _begin_writing(
        self, write: Callable[[dict[str, Tensors]], None], tensors: Mapping[str, Iterable[tuple[str, Tensor]]]
    ) -> None:
        """Begin `write` on the main process, with copies of the tensors as they are now."""
        with self._ranks.raise_together():
            self.writer.wait()  # the copies of the job before are overwritten now
        copies = {name: self._on_host(name, each) for name, each in tensors.items()}
        with self._ranks.raise_together():
            if self._accelerator.is_main_process:
                self.writer.begin(partial(write, copies))

    def _on_host(self, name: str, tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
        if self._accelerator.is_main_process:
            return self._host_copy(name, tensors)
        for _ in tensors:  # each one is gathered, and the main process needs this one's shard
            pass
        return {}

    def _write_averages(self, step: int, copies: dict[str, Tensors]) -> None:
        posthoc_ema.save(self._run, step, copies["averages"])

    def _write_checkpoint(self, metadata: dict[str, Any], copies: dict[str, Tensors]) -> None:
        settings, averages = self._config.train, copies.pop("averages", None)
        if averages is not None:
            posthoc_ema.save(self._run, metadata["step"], averages)
        keep = (settings.keep_checkpoints, settings.keep_every)
        log.info("saved %s", checkpoints.save_checkpoint(self._run, metadata, copies, *keep))
        if settings.averages is not None:
            kept = [checkpoints.step_of(folder) for folder in checkpoints.list_checkpoints(self._run)]
            posthoc_ema.prune(self._run, kept, settings.averages.snapshot_every)

    def _metadata(self) -> dict[str, Any]:
        """The contents of state.json."""
        scaler = self._accelerator.scaler
        return {
            "step": self._state.step,
            "left_out": self._state.guard.state(),
            "config": self._config.model_dump(mode="json"),
            "dataset": self._fingerprint,
            "world_size": self._accelerator.num_processes,
            "backend": self._state.backend.name,
            "precision": self._accelerator.mixed_precision,
            "scaler": None if scaler is None else scaler.state_dict(),
            "versions": {
                "sitdist": sitdist.__version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "accelerate": version("accelerate"),
            },
        }
