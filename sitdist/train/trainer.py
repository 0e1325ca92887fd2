"""Training: a run is a pure function of (config, dataset, seed, step), on any number of processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sitdist.config.experiment import Config
from sitdist.config.load import dump_yaml
from sitdist.dataset.batches import Batch, BatchReader
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.prefetch import Prefetch
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.resident import ResidentSamples
from sitdist.dataset.store import store_of
from sitdist.distributed.accelerator import backend_of_launcher, count_nodes, make_backend, processes
from sitdist.distributed.ranks import Ranks
from sitdist.distributed.signals import StopSignal
from sitdist.errors import CheckpointError, RunInterrupted
from sitdist.flow.interpolant import get_interpolant
from sitdist.flow.loss import flow_loss, weigh_times
from sitdist.inference.calibration import calibrate_if_possible
from sitdist.io.atomic import write_atomically
from sitdist.io.ownership import only_writer
from sitdist.model.flops import training_flops
from sitdist.model.pretrained import initialize_from
from sitdist.runs import checkpoint as checkpoints
from sitdist.runs.averages import Averages
from sitdist.runs.build import build_endpoint, build_model, load_matching_codec
from sitdist.train.compile import (
    ScheduledCollection,
    begin_forward,
    compile_model,
    keep_freed_memory,
    recompute_activations,
)
from sitdist.train.ema import Ema
from sitdist.train.guard import Guard, nan_if_not_finite
from sitdist.train.hooks import Hook, StepResult
from sitdist.train.inputs import Inputs, VariedViews, make_inputs, split_batch
from sitdist.train.memory import check_memory
from sitdist.train.monitor import Monitor
from sitdist.train.optimizer import build_optimizer
from sitdist.train.profiling import LayerNorms, StepProfile
from sitdist.train.review import Review
from sitdist.train.saving import Saver, TrainState, check_resumable, find_newest
from sitdist.train.schedule import learning_rate
from sitdist.train.validation import PeriodicValidation, Validation

log = getLogger(__name__)


def train(config: Config, run: Path) -> None:
    """Train `config` in the folder `run`, from its newest whole checkpoint if it has one; every process calls it.

    At the end, fit error bars on the validation views, where the dataset has enough of them. RunInterrupted after
    SIGTERM, SIGINT or SIGUSR1, with a checkpoint of the last step done.
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
        begun = trainer.step
        try:
            trainer.run_steps(stop)
        finally:
            trainer.close()
        calibrates = accelerator.is_main_process and trainer.step > begun
    if calibrates and config.flow.why_no_pose() is None:
        log.info("%s", calibrate_if_possible(run))


class Trainer:
    """One process's part of a run: opened at a checkpoint or at step 0, then trained up to `config.train.steps`."""

    def __init__(self, config: Config, run: Path, accelerator: Accelerator, ranks: Ranks) -> None:
        self.config, self.run, self.accelerator, self.ranks = config, run, accelerator, ranks
        settings, device, world = config.train, accelerator.device, accelerator.num_processes
        if device.type == "cpu":
            keep_freed_memory()

        # ---- data and model: the same weights on every process, because every process seeds its CPU generator alike
        with ranks.raise_together():
            store = store_of(config)
            self.dataset = store.folder
            self.manifest = load_manifest(self.dataset)
            fingerprint = checkpoints.dataset_fingerprint(self.dataset)
            self.split = split_batch(settings.global_batch, world, settings.max_batch_per_device)
            shards = ShardReader(store, "train", views=config.appearance is not None)
            reader = self._open_reader(shards)
            self.interpolant = get_interpolant(config.flow.path, config.flow.prediction)
            self.endpoint = build_endpoint(config.flow)
            torch.manual_seed(config.seed)
            model = build_model(config.model, self.manifest, self.endpoint).to(device)
            if device.type == "cpu":
                check_memory(config, model, self.split.micro, backend_of_launcher(os.environ), world)
            ema = Ema(model, settings.ema_decay)

        # ---- from a checkpoint, from given weights, or from scratch
        newest: checkpoints.Checkpoint | None = None
        with ranks.raise_together():
            if accelerator.is_main_process:
                newest = find_newest(run)
        start = ranks.broadcast(None if newest is None else newest.step)
        with ranks.raise_together():
            if start is None and config.model.init_from is not None:
                log.info("%s", initialize_from(model, Path(config.model.init_from)))
                ema = Ema(model, settings.ema_decay)
        recompute_activations(model, settings.activation_checkpointing)
        compile_model(model, settings.compile)
        backend = make_backend(backend_of_launcher(os.environ), accelerator)
        make_optimizer = partial(build_optimizer, config=settings.optimizer)
        backend.setup(model, ema.model, make_optimizer, settings.optimizer.clip_norm)
        ema.follow(model)
        more = settings.averages
        averages = None if more is None else Averages(model, more.decays, more.sigma_rels)
        guard = Guard(ranks, settings.non_finite, accelerator.scaler is not None)
        self.state = TrainState(model, ema, averages, backend, guard)
        with ranks.raise_together():
            if start is not None:
                loaded = newest or checkpoints.read_checkpoint(checkpoints.folder_of(run, start))
                check_resumable(loaded, config, self.dataset, fingerprint)
                self.state.resume(run, loaded, accelerator, settings.steps)
        self._buckets_settled = not backend.settles_buckets
        self._learning_rate = partial(
            learning_rate,
            base=settings.optimizer.lr,
            steps=settings.steps,
            kind=settings.schedule.kind,
            warmup_steps=settings.schedule.warmup_steps,
            final_ratio=settings.schedule.final_ratio,
        )

        # ---- what happens around the steps, in this order
        with ranks.raise_together():
            validation: Validation | None = None
            if accelerator.is_main_process and settings.validate_every is not None:
                codec = load_matching_codec(self.dataset / "codec", self.manifest, device)
                validation = Validation(config, self.dataset, self.manifest, codec, device)
            rank, scaler = accelerator.process_index, accelerator.scaler
            vary = self._vary_views(shards)
            self.prefetch = Prefetch(reader, rank, world, settings.steps, config.reader.workers, device, vary)
            monitor = Monitor(run, accelerator, ranks, config, self.step, training_flops(model))
            self.saver = Saver(run, config, fingerprint, self.state, accelerator, ranks, monitor)
            self.hooks: list[Hook] = [
                guard,
                monitor,
                Review(settings.log_every, guard, monitor, self.saver, ranks, scaler),
                LayerNorms(model, settings.layer_norms_every, monitor, scaler),
                StepProfile(run, settings.profile, rank, device),
                ScheduledCollection(),
                PeriodicValidation(settings.validate_every, validation, self.averaged_model, ranks, monitor),
                self.saver,
            ]
            if accelerator.is_main_process:
                self._write_run()  # last, so that what is refused above changes nothing

    @property
    def step(self) -> int:
        """How many updates the weights have seen."""
        return self.state.step

    def _open_reader(self, shards: ShardReader) -> BatchReader:
        settings = self.config.reader
        samples = ResidentSamples(shards, self.accelerator.device) if settings.resident else shards
        return BatchReader(
            samples,
            self.config.seed,
            self.config.train.global_batch,
            settings.on_bad_sample,
            settings.max_bad_samples,
            count_nodes(self.accelerator.num_processes) if settings.split_by_node else 1,
        )

    def _vary_views(self, shards: ShardReader) -> VariedViews | None:
        """What draws the appearance of the views that train reading poses."""
        if self.config.appearance is None:
            return None
        device = self.accelerator.device
        codec = load_matching_codec(self.dataset / "codec", self.manifest, device)
        log.info("Appearances are drawn anew at every visit, and encoded on %s.", device)
        return VariedViews(self.config, self.interpolant, shards, codec)

    def _write_run(self) -> None:
        """Write what makes the run usable without the dataset's folder: config, manifest and codec."""
        write_atomically(self.run / "config.yaml", lambda path: path.write_text(dump_yaml(self.config)))
        try:
            shutil.copyfile(self.dataset / "manifest.json", self.run / "dataset.json")
            shutil.copytree(self.dataset / "codec", self.run / "codec", dirs_exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.run}: cannot be written: {error.strerror}; choose another --out") from None
        checkpoints.remove_unfinished(self.run)

    # ------------------------------------------------------------------------------------------------------- the loop

    def run_steps(self, stop: StopSignal, until: int | None = None) -> None:
        """Train until the last step, or up to step `until`, or until a process is asked to stop."""
        end = self.config.train.steps if until is None else until
        if self.step < end:
            read = self._begin_reading(stop)
        while self.step < end:
            batch, waited, stopping = read()
            if stopping:
                self._stop()
            for hook in self.hooks:
                hook.before_step(self.step)
            done = self.train_step(batch, waited)
            if self.step < end:
                read = self._begin_reading(stop)  # while the device computes
            for hook in self.hooks:
                hook.after_step(done)
        self.saver.finish()

    def train_step(self, batch: Batch, waited: float) -> StepResult:
        """Update the weights by the mean loss over a global batch; if it is not finite, nothing changes."""
        state, step = self.state, self.state.step
        batch = batch.to(self.accelerator.device)
        inputs = make_inputs(batch, self.config, self.endpoint, self.interpolant)  # noise and t by global position
        self._settle_buckets(inputs)
        losses = self._accumulate_gradients(inputs)  # [local batch]
        for hook in self.hooks:
            hook.after_backward()
        norm = state.backend.clip_gradients()  # 0-d, the same on every process
        ok, lr = norm.isfinite(), self._learning_rate(step)  # `ok` stays on the device: nobody waits for it
        state.backend.update(lr, ok)
        state.ema.update(step, ok)
        if state.averages is not None:
            state.averages.update(step, ok)
        state.step += 1
        is_last = state.step == self.config.train.steps
        return StepResult(state.step, is_last, batch.keys, losses, inputs.t, norm, ok, lr, waited)

    def _accumulate_gradients(self, inputs: Inputs) -> Tensor:
        """Backward over the micro-batches; returns the losses [local batch].

        Gradients are averaged over processes with the last micro-batch, so a process's share of the global mean is
        multiplied by the number of processes.
        """
        flow, backend, losses = self.config.flow, self.state.backend, []
        share = self.accelerator.num_processes / self.config.train.global_batch
        micro_batches = list(inputs.split(self.split.micro))
        for micro in micro_batches:
            if self.config.train.compile == "graphs":
                begin_forward()
            model = self.endpoint.conditioned(backend.model, micro.packed_pose)
            with backend.accumulate(is_last=micro is micro_batches[-1]):
                x0, x1, t = micro.x0, micro.x1, micro.t
                options = (micro.drop_labels, flow.prediction, flow.loss_weight)
                loss = flow_loss(model, self.interpolant, x0, x1, t, micro.y, *options)  # [micro]
                weighed = weigh_times(loss, t, flow.weight_at_one)
                backend.backward((weighed * nan_if_not_finite(loss)).sum() * share)
            losses.append(loss.detach())
        return torch.cat(losses)

    def _settle_buckets(self, inputs: Inputs) -> None:
        """Let DDP order its buckets before the first update.

        It sums in that order, and finds it in its first backward pass; a resumed run must not differ there.
        """
        if not self._buckets_settled:
            self._accumulate_gradients(inputs)
            self.state.backend.zero_grad()
            self._buckets_settled = True

    def _begin_reading(self, stop: StopSignal) -> Callable[[], tuple[Batch, float, bool]]:
        """Get the next batch, and begin to ask whether all processes have theirs and whether one is asked to stop.

        Call the result for this process's batch, the seconds it took and whether to stop; it raises the error of any
        process. The device computes meanwhile.
        """
        failure, read = None, None
        try:
            self.saver.writer.check()
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
        self.saver.save()
        self.saver.finish()
        raise RunInterrupted(
            f"stopped after step {self.step} of {self.config.train.steps}; go on with the same command"
        )

    def averaged_model(self) -> nn.Module:
        """The full averaged model, on the main process; every process calls it."""
        ema, backend = self.state.ema.model, self.state.backend
        if not backend.shards_weights:
            return ema
        tensors = dict(backend.full_tensors(ema))
        if not self.accelerator.is_main_process:
            return ema
        model = build_model(self.config.model, self.manifest, self.endpoint).to(self.accelerator.device)
        model.load_state_dict(tensors)
        return model.requires_grad_(False).eval()

    def close(self) -> None:
        """Stop reading ahead, and close the hooks, the last one first."""
        self.prefetch.close()
        for hook in reversed(self.hooks):
            hook.close()
