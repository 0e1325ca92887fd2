"""Training: a run is a pure function of (config, dataset, seed, step), on any number of processes."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import sitdist
from sitdist.config.experiment import Config
from sitdist.config.load import dump_yaml
from sitdist.dataset.batches import Batch, BatchReader
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.prefetch import Prefetch
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.resident import ResidentSamples
from sitdist.dataset.store import Store, store_of
from sitdist.distributed.accelerator import backend_of_launcher, count_nodes, processes
from sitdist.distributed.backend import make_backend
from sitdist.distributed.optimizer_state import check_optimizer
from sitdist.distributed.ranks import Ranks
from sitdist.distributed.signals import StopSignal
from sitdist.errors import CheckpointError, ConfigError, RunInterrupted
from sitdist.flow import draws
from sitdist.flow.endpoint import sample_times
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.loss import flow_loss, training_interval, weigh_times
from sitdist.io.atomic import write_atomically
from sitdist.io.ownership import only_writer
from sitdist.model.codec import draw_latent
from sitdist.model.flops import training_flops
from sitdist.model.pretrained import initialize_from
from sitdist.runs import averages as posthoc_ema
from sitdist.runs import checkpoint as checkpoints
from sitdist.runs.build import build_endpoint, build_model, load_matching_codec
from sitdist.train.async_writer import AsyncWriter, HostCopy
from sitdist.train.compile import (
    ScheduledCollection,
    begin_forward,
    compile_model,
    keep_freed_memory,
    recompute_activations,
)
from sitdist.train.ema import Ema
from sitdist.train.guard import Guard, nan_if_not_finite
from sitdist.train.memory import check_memory
from sitdist.train.monitor import Monitor
from sitdist.train.optimizer import build_optimizer
from sitdist.train.profiling import LayerNorms, StepProfile
from sitdist.train.schedule import learning_rate
from sitdist.train.validation import Validation

log = logging.getLogger(__name__)


def train(config: Config, run: Path) -> None:
    """Train `config` in the folder `run`, from its newest whole checkpoint if it has one; every process calls it.

    RunInterrupted after SIGTERM, SIGINT or SIGUSR1, with a checkpoint of the last step done.
    """
    settings, run = config.train, Path(run)
    with (
        processes(settings.precision, settings.deterministic) as (accelerator, ranks),
        StopSignal() as stop,
        ExitStack() as held,
    ):
        with ranks.raise_together():
            if accelerator.is_main_process:
                held.enter_context(only_writer(run, "run"))
        trainer = Trainer(config, run, accelerator, ranks)
        try:
            trainer.run_steps(stop)
        finally:
            trainer.close()


@dataclass(frozen=True)
class Inputs:
    """What one forward pass sees: endpoints x0, x1 [B, C, h, w], times t [B], labels y [B], labels to drop [B].

    And the packed poses [B, 4, 4], for a model that is conditioned on them.
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    y: Tensor
    drop_labels: Tensor | None
    packed_pose: Tensor


def make_inputs(batch: Batch, config: Config, device: torch.device) -> Inputs:
    """The inputs of `batch`; every random number is keyed by (seed, global position), not by process."""
    batch = batch.to(device)
    positions, moments = batch.positions, batch.moments
    channels, height, width = moments.shape[1] // 2, *moments.shape[2:]

    def normal(stream: str) -> Tensor:
        numbers = draws.normal(config.seed, stream, positions, channels * height * width)
        return numbers.reshape(-1, channels, height, width)

    def uniform(stream: str, count: int) -> Tensor:
        return draws.uniform(config.seed, stream, positions, count)

    flow, dropout = config.flow, config.model.class_dropout_prob
    interval = training_interval(get_interpolant(flow.path), flow.prediction, flow.loss_weight)
    return Inputs(
        x0=build_endpoint(config.flow).x0(batch.packed_pose, normal("noise")),
        x1=draw_latent(moments, normal("posterior")),
        t=sample_times(uniform("time", 2), flow.share_at_one, flow.share_at_zero, interval),
        y=batch.label,
        drop_labels=uniform("dropout", 1)[:, 0] < dropout if dropout > 0 else None,
        packed_pose=batch.packed_pose,
    )


@dataclass(frozen=True)
class BatchSplit:
    """How many samples of a global batch one process has, and how many of them go through the model at a time."""

    local: int
    micro: int


def split_batch(global_batch: int, world: int, max_per_device: int | None) -> BatchSplit:
    """Equal shares for `world` processes and equal micro-batches of at most `max_per_device` samples."""
    if global_batch % world:
        below, above = global_batch // world * world, math.ceil(global_batch / world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train.global_batch = {global_batch}: cannot be divided by {world} processes; "
            f"set it to {nearest}, or start another number of processes"
        )
    local = global_batch // world
    largest = min(local, max_per_device or local)
    return BatchSplit(local, next(size for size in range(largest, 0, -1) if local % size == 0))


class Trainer:
    """One process's part of a run: opened at a checkpoint or at step 0, then trained up to `config.train.steps`."""

    def __init__(self, config: Config, run: Path, accelerator: Accelerator, ranks: Ranks) -> None:
        self.config, self.run, self.accelerator, self.ranks = config, run, accelerator, ranks
        self.step = 0
        self.saved_step: int | None = None
        self.buckets_settled = False
        self.host_copy, self.writer = HostCopy(), AsyncWriter(config.train.checkpoint_async)
        self.backend = make_backend(backend_of_launcher(os.environ), accelerator)
        self.guard = Guard(ranks, config.train.non_finite, accelerator.scaler is not None)
        device, world = accelerator.device, accelerator.num_processes
        if device.type == "cpu":
            keep_freed_memory()

        # ---- data and model: the same weights on every process, because every process seeds its CPU generator alike
        with ranks.raise_together():
            store = store_of(config)
            self.dataset = store.folder
            self.manifest = manifest = load_manifest(self.dataset)
            self.fingerprint = checkpoints.dataset_fingerprint(self.dataset)
            self.split = split_batch(config.train.global_batch, world, config.train.max_batch_per_device)
            reader = self._open_reader(store)
            self.interpolant = get_interpolant(config.flow.path, config.flow.prediction)
            self.endpoint = build_endpoint(config.flow)
            torch.manual_seed(config.seed)
            self.raw_model = build_model(config.model, manifest, self.endpoint).to(device)
            if device.type == "cpu":
                check_memory(config, self.raw_model, self.split.micro, backend_of_launcher(os.environ), world)
            self.ema = Ema(self.raw_model, config.train.ema_decay)

        # ---- where it goes on
        newest: checkpoints.Checkpoint | None = None
        with ranks.raise_together():
            if accelerator.is_main_process:
                newest = self._find_newest()
        start = ranks.broadcast(None if newest is None else newest.step)
        with ranks.raise_together():
            if start is None and config.model.init_from is not None:
                log.info("%s", initialize_from(self.raw_model, Path(config.model.init_from)))
                self.ema = Ema(self.raw_model, config.train.ema_decay)
        recompute_activations(self.raw_model, config.train.activation_checkpointing)
        compile_model(self.raw_model, config.train.compile)
        self.backend.set_up(
            self.raw_model,
            self.ema.model,
            partial(build_optimizer, config=config.train.optimizer),
            config.train.optimizer.clip_norm,
        )
        self.ema.follow(self.raw_model)
        self.averages: posthoc_ema.Averages | None = None
        if config.train.averages is not None:
            wanted = config.train.averages
            self.averages = posthoc_ema.Averages(self.raw_model, wanted.decays, wanted.sigma_rels)
        with ranks.raise_together():
            if start is not None:
                self._go_on_from(newest or checkpoints.read_checkpoint(checkpoints.folder_of(run, start)))
                if self.averages is not None:
                    self.averages.load(posthoc_ema.path_of(run, start))

        # ---- what watches it
        self.validation: Validation | None = None
        steps, global_batch = config.train.steps, config.train.global_batch
        with ranks.raise_together():
            if accelerator.is_main_process and config.train.validate_every is not None:
                codec = load_matching_codec(self.dataset / "codec", manifest, device)
                self.validation = Validation(config, self.dataset, manifest, codec, device)
            self.prefetch = Prefetch(reader, accelerator.process_index, world, steps, config.reader.workers, device)
            flops = training_flops(self.raw_model)
            self.monitor = Monitor(run, accelerator, ranks, self.step, steps, global_batch, flops, config)
            self.layer_norms = LayerNorms(self.raw_model, config.train.layer_norms_every)
            span = None if config.train.profile is None else (config.train.profile.start, config.train.profile.steps)
            self.profile = StepProfile(run, span, accelerator.process_index, device)
            self.collection = ScheduledCollection()
            if accelerator.is_main_process:
                self._write_run()  # last, so that what is refused above changes nothing

    def _open_reader(self, store: Store) -> BatchReader:
        settings = self.config.reader
        shards = ShardReader(store, "train")
        samples = ResidentSamples(shards, self.accelerator.device) if settings.resident else shards
        return BatchReader(
            samples,
            self.config.seed,
            self.config.train.global_batch,
            settings.on_bad_sample,
            settings.max_bad_samples,
            count_nodes(self.accelerator.num_processes) if settings.split_by_node else 1,
        )

    # ------------------------------------------------------------------------------------------------------- the loop

    def run_steps(self, stop: StopSignal, until: int | None = None) -> None:
        """Train until the last step, or up to step `until`, or until a process is asked to stop."""
        settings = self.config.train
        end = settings.steps if until is None else until
        if self.step < end:
            ahead = self._read_ahead(stop)
        while self.step < end:
            step = self.step
            batch, waited, stopping = ahead()
            if stopping:
                self._stop()
            self.profile.before(step)
            self.layer_norms.begin(step)
            inputs = make_inputs(batch, self.config, self.accelerator.device)
            if not self.buckets_settled:
                self._settle_buckets(inputs)

            # ---- gradients of the mean loss over the global batch
            losses = self._accumulate_gradients(inputs)
            scaler = self.accelerator.scaler
            layers = self.layer_norms.end(scaler)
            norm = self._clip_gradients()

            # ---- update, which changes nothing where something is not finite; nobody waits to know
            ok = norm.isfinite()
            lr = self._learning_rate(step)
            self.backend.update(lr, ok)
            self.ema.update(step, ok)
            if self.averages is not None:
                self.averages.update(step, ok)
            self.guard.observe(step, batch.keys, losses, ok)
            self.step = step + 1
            if self.step < end:
                ahead = self._read_ahead(stop)

            # ---- tell, validate, save
            self.monitor.observe_losses(losses, inputs.t)
            self.monitor.observe_step(waited, norm)
            last = self.step == settings.steps
            if self.step % settings.log_every == 0 or last:
                self._review(lr)
            if layers:
                self.monitor.write_scalars(self.step, layers, "train_layers")
            self.profile.after(step)
            self.collection.after(self.step)
            if settings.validate_every is not None and (self.step % settings.validate_every == 0 or last):
                self._validate()
            if self._is_snapshot():
                self._save_averages()
            if last or (settings.checkpoint_every and self.step % settings.checkpoint_every == 0):
                self.save()
        self._finish_writing()

    def _read_ahead(self, stop: StopSignal) -> Callable[[], tuple[Batch, float, bool]]:
        """Get the next batch, and begin to ask whether all have theirs and whether one is asked to stop.

        What is returned gives this process's batch, the seconds it took and whether to stop; it raises what one of the
        processes met. The device computes meanwhile.
        """
        failure, read = None, None
        try:
            self.writer.check()
            read = self.prefetch.batch(self.step)
        except Exception as error:
            failure = error
        answer = self.ranks.begin_any(failure is not None, stop.requested is not None)

        def finish() -> tuple[Batch, float, bool]:
            failed, stopping = answer()
            if failed or read is None:
                self.ranks.raise_first(failure)
            return *read, stopping

        return finish

    def _stop(self) -> NoReturn:
        """Save, and raise RunInterrupted."""
        if self.step == 0:
            raise RunInterrupted("stopped before the first step; the same command starts again")
        self.save()
        self._finish_writing()
        raise RunInterrupted(
            f"stopped after step {self.step} of {self.config.train.steps}; go on with the same command"
        )

    def _review(self, lr: float) -> None:
        """The one place where the host waits for the device: look at what the steps came to, and tell."""
        scaler = self.accelerator.scaler
        loss_scale = None if scaler is None else scaler.get_scale()
        self.guard.read()
        self.monitor.write_line(self.step, lr, loss_scale, self.guard.total)
        self.guard.check_budget(self.step, loss_scale)
        if self.guard.too_many_in_a_row():
            self._roll_back()

    def _roll_back(self) -> None:
        """Take the weights of the last checkpoint before the steps that were left out, and go on with the next batch.

        Only a checkpoint that every run of this config has counts, so that one that was stopped ends like one that was
        not.
        """
        since, every = self.step - self.guard.in_a_row, self.config.train.checkpoint_every
        found = None
        with self.ranks.raise_together():
            self.writer.wait()
            if self.accelerator.is_main_process and every is not None:
                for folder in reversed(checkpoints.list_checkpoints(self.run)):
                    step = checkpoints.step_of(folder)
                    if step < since and step % every == 0:
                        found = step
                        break
        target = self.ranks.broadcast(found)
        if target is None:
            self.guard.give_up(
                self.step, f"{self.guard.in_a_row} steps in a row were left out, and there is no checkpoint before them"
            )
        with self.ranks.raise_together():
            self._load_weights(checkpoints.read_checkpoint(checkpoints.folder_of(self.run, target)))
            if self.averages is not None:
                self.averages.load(posthoc_ema.path_of(self.run, target))
        if self.accelerator.is_main_process:
            log.warning(
                "%d steps in a row were left out: back to the weights after step %d, and on with step %d",
                *(self.guard.in_a_row, target, self.step),
            )
        self.guard.rolled_back()

    def _accumulate_gradients(self, inputs: Inputs) -> Tensor:
        """Backward over the micro-batches; returns the losses [local batch].

        Gradients are averaged over processes, so each process's share of the global mean is scaled by their number.
        That is done with the last micro-batch only.
        """
        losses = []
        starts = range(0, self.split.local, self.split.micro)
        for start in starts:
            if self.config.train.compile == "graphs":
                begin_forward()
            part = slice(start, start + self.split.micro)
            drop_labels = None if inputs.drop_labels is None else inputs.drop_labels[part]
            model = self.endpoint.conditioned(self.backend.model, inputs.packed_pose[part])
            with self.backend.accumulating(is_last=start == starts[-1]):
                loss = flow_loss(
                    model,
                    self.interpolant,
                    inputs.x0[part],
                    inputs.x1[part],
                    inputs.t[part],
                    inputs.y[part],
                    drop_labels,
                    self.config.flow.prediction,
                    self.config.flow.loss_weight,
                )  # [micro]
                share = self.accelerator.num_processes / self.config.train.global_batch
                weighed = weigh_times(loss, inputs.t[part], self.config.flow.weight_at_one)
                self.backend.backward((weighed * nan_if_not_finite(loss)).sum() * share)
            losses.append(loss.detach())
        return torch.cat(losses)

    def _settle_buckets(self, inputs: Inputs) -> None:
        """Let DDP order its buckets before the first update.

        It sums in that order, and finds it in its first backward pass; a resumed run must not differ there.
        """
        if self.backend.settles_buckets:
            self._accumulate_gradients(inputs)
            self.backend.forget_gradients()
        self.buckets_settled = True

    def _clip_gradients(self) -> Tensor:
        """Clip to `clip_norm`; returns the norm before (0-d, on the device), which is the same on every process."""
        return self.backend.clip_gradients()

    def _learning_rate(self, step: int) -> float:
        settings = self.config.train
        return learning_rate(
            step,
            base=settings.optimizer.lr,
            steps=settings.steps,
            kind=settings.schedule.kind,
            warmup_steps=settings.schedule.warmup_steps,
            final_ratio=settings.schedule.final_ratio,
        )

    # ------------------------------------------------------------------------------------------------------- the run

    def _find_newest(self) -> checkpoints.Checkpoint | None:
        """The checkpoint to go on from, or None to start at step 0; the main process calls it."""
        newest = checkpoints.read_newest(self.run)
        if newest is None and any((self.run / "checkpoints").glob("step_*")):
            raise CheckpointError(
                f"{self.run / 'checkpoints'}: no checkpoint in it is whole; put one back, or start another run with "
                "another --out"
            )
        return newest

    def _go_on_from(self, loaded: checkpoints.Checkpoint) -> None:
        """Take everything from a checkpoint, after checking that config and dataset are the ones that it was of."""
        checkpoints.check_same_config(loaded, self.config)
        checkpoints.check_same_dataset(loaded, self.dataset, self.fingerprint)
        if loaded.step > self.config.train.steps:
            raise ConfigError(
                f"train.steps = {self.config.train.steps}: {loaded.folder} has already seen {loaded.step}; "
                "set it higher"
            )
        self._load_weights(loaded)
        self.guard.load(loaded.state.get("left_out", self.guard.state()))
        before, now = loaded.state.get("precision"), self.accelerator.mixed_precision
        if before not in (None, now):
            log.warning(
                "%s was trained in %s and this device goes on in %s: the rest differs in rounding",
                *(loaded.folder, before.replace("no", "fp32"), now.replace("no", "fp32")),
            )
        self.step = self.saved_step = loaded.step
        if self.accelerator.scaler is not None and loaded.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(loaded.state["scaler"])
        if self.step == self.config.train.steps:
            log.info("%s: finished, all %d steps are trained; train.steps set higher goes on", self.run, self.step)
        else:
            log.info("going on from %s", loaded.folder)

    def _load_weights(self, loaded: checkpoints.Checkpoint) -> None:
        """Weights, their average and the optimizer's state."""
        tensors, of_file = loaded.tensors, loaded.folder.joinpath
        checkpoints.check_tensors(self.raw_model, tensors["model"], of_file("model.safetensors"))
        checkpoints.check_tensors(self.ema.model, tensors["ema"], of_file("ema.safetensors"))
        parameters = {name: each for name, each in self.raw_model.named_parameters() if each.requires_grad}
        state = check_optimizer(parameters, tensors["optimizer"], of_file("optimizer.safetensors"))
        self.backend.load(self.raw_model, tensors["model"])
        self.backend.load(self.ema.model, tensors["ema"])
        self.backend.load_optimizer(state)

    def _write_run(self) -> None:
        """The files that make the run usable without the dataset's folder: config, manifest and codec."""
        write_atomically(self.run / "config.yaml", lambda path: path.write_text(dump_yaml(self.config)))
        try:
            shutil.copyfile(self.dataset / "manifest.json", self.run / "dataset.json")
            shutil.copytree(self.dataset / "codec", self.run / "codec", dirs_exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run}: cannot be written: {error.strerror}; choose another --out") from None
        checkpoints.remove_unfinished(self.run)

    def save(self) -> None:
        """Take a copy of all that a checkpoint holds, and begin to write it; every process calls it."""
        if self.saved_step == self.step:
            return
        begun = time.perf_counter()
        self.guard.read()
        averages = None if self.averages is None or self._is_snapshot() else self.averages.tensors()
        tensors = {
            "model": self.backend.whole(self.raw_model),
            "ema": self.backend.whole(self.ema.model),
            "optimizer": self.backend.whole_optimizer(),
        }
        self._write(partial(self._write_checkpoint, self._state()), tensors, averages)
        self.saved_step = self.step
        self.monitor.observe_checkpoint(time.perf_counter() - begun)

    def _write(self, job: Callable[..., None], *tensors: Any) -> None:
        """Begin job(*tensors) on the main process, with copies of what is given; every process calls it.

        Each of `tensors` is None, pairs of names and tensors, or a dictionary of such pairs.
        """
        with self.ranks.raise_together():
            self.writer.wait()  # for the one before, whose copies are written over now
        copies = [self._on_host(each, str(place)) for place, each in enumerate(tensors)]
        with self.ranks.raise_together():
            if self.accelerator.is_main_process:
                self.writer.begin(partial(job, *copies))

    def _on_host(self, tensors: Any, place: str) -> Any:
        if tensors is None:
            return None
        if isinstance(tensors, dict):
            return {name: self._on_host(each, f"{place}/{name}") for name, each in tensors.items()}
        if self.accelerator.is_main_process:
            return self.host_copy(place, tensors)
        for _ in tensors:  # what the main process needs of this one
            pass
        return None

    def _write_checkpoint(
        self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]], averages: dict[str, Tensor] | None
    ) -> None:
        step, settings = state["step"], self.config.train
        if averages is not None:
            posthoc_ema.save(self.run, step, averages)
        folder = checkpoints.save_checkpoint(self.run, state, tensors, settings.keep_checkpoints, settings.keep_every)
        log.info("saved %s", folder)
        if settings.averages is not None:
            kept = [checkpoints.step_of(folder) for folder in checkpoints.list_checkpoints(self.run)]
            posthoc_ema.prune(self.run, kept, settings.averages.snapshot_every)

    def _finish_writing(self) -> None:
        """Wait until what was saved is on disk."""
        with self.ranks.raise_together():
            self.writer.wait()

    def _is_snapshot(self) -> bool:
        """Whether the averages of this step are kept for good."""
        every = None if self.config.train.averages is None else self.config.train.averages.snapshot_every
        return every is not None and self.step % every == 0

    def _save_averages(self) -> None:
        if self.averages is not None:
            self._write(partial(posthoc_ema.save, self.run, self.step), self.averages.tensors())

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "left_out": self.guard.state(),
            "config": self.config.model_dump(mode="json"),
            "dataset": self.fingerprint,
            "world_size": self.accelerator.num_processes,
            "backend": self.backend.name,
            "precision": self.accelerator.mixed_precision,
            "scaler": None if scaler is None else scaler.state_dict(),
            "versions": {
                "sitdist": sitdist.__version__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "accelerate": version("accelerate"),
            },
        }

    def _validate(self) -> None:
        begun = time.perf_counter()
        averaged = self._whole_average()
        with self.ranks.raise_together():
            if self.validation is not None:
                result = self.validation.measure(averaged)
                self.monitor.write_scalars(self.step, result.scalars, "validation")
                if result.picture is not None:
                    self.monitor.write_picture(self.step, "validation/generated_above_true", result.picture)
                if result.rotation_errors_deg is not None:
                    self.monitor.write_error_curve(self.step, "validation/rotation_errors", result.rotation_errors_deg)
        self.monitor.observe_validation(time.perf_counter() - begun)

    def _whole_average(self) -> nn.Module:
        """The averaged weights in one piece; every process calls it."""
        if not self.backend.shares_weights:
            return self.ema.model
        tensors = dict(self.backend.whole(self.ema.model))
        if not self.accelerator.is_main_process:
            return self.ema.model
        model = build_model(self.config.model, self.manifest, self.endpoint).to(self.accelerator.device)
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()

    def close(self) -> None:
        """Stop reading ahead and write out what is buffered."""
        self.writer.close()
        self.prefetch.close()
        self.profile.close()
        self.collection.close()
        self.monitor.close()
