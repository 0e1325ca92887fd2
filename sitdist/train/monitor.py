"""The logs of a run: TensorBoard, metrics.jsonl, a tracker and a progress bar, all from the main process."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from sitdist.config.experiment import Config
from sitdist.distributed.ranks import Ranks
from sitdist.errors import ConfigError
from sitdist.io.atomic import write_atomically
from sitdist.model.flops import listed_peak
from sitdist.runs.checkpoint import flatten
from sitdist.train.hooks import Hook, StepResult

log = logging.getLogger(__name__)
INTERIOR_BINS = 4
RECENT, FEWEST = 10, 3  # lines before a loss, and how few of them tell what is usual
BIN_NAMES = (
    "loss_by_t/0",
    *(f"loss_by_t/{i / INTERIOR_BINS:g}-{(i + 1) / INTERIOR_BINS:g}" for i in range(INTERIOR_BINS)),
    "loss_by_t/1",
)


def time_bin(t: Tensor) -> Tensor:
    """Which of BIN_NAMES each time [B] belongs to: exactly 0, a quarter of what lies between, exactly 1."""
    interior = 1 + (t * INTERIOR_BINS).floor().clamp(0, INTERIOR_BINS - 1).long()
    ends = torch.where(t == 1.0, torch.full_like(interior, INTERIOR_BINS + 1), interior)
    return torch.where(t == 0.0, torch.zeros_like(interior), ends)


class Monitor(Hook):
    """Averages over samples, processes and the steps since the last line; one line every `log_every` steps.

    Averages after a resume start at the resumed step, `start`. Every process calls every method. `flops`: of training
    on one sample, for the utilization of the devices.
    """

    def __init__(
        self,
        run: Path,
        accelerator: Accelerator,
        ranks: Ranks,
        config: Config,
        start: int = 0,
        flops: int | None = None,
    ) -> None:
        settings = config.train
        self._ranks, self._global_batch, self._flops = ranks, settings.global_batch, flops
        self._device, self._tracker = accelerator.device, None
        self._spike = settings.loss_spike
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._spikes = 0
        self._peak = None
        if self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
            precision = accelerator.mixed_precision
            self._peak = listed_peak(name, "fp32" if precision == "no" else precision)
        self._loss_sums = torch.zeros(len(BIN_NAMES), dtype=torch.float64, device=accelerator.device)
        self._loss_counts = torch.zeros_like(self._loss_sums)
        self._norm_sum, self._norm_count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        self._reset()
        self._lines: TextIO | None = None
        self._board: Any = None
        self._bar: tqdm | None = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
            keep_lines_until(run / "metrics.jsonl", start)
            self._lines = (run / "metrics.jsonl").open("a")
            values = flatten(config.model_dump(mode="json"))
            self._tracker = open_tracker(settings.tracker, run, config.name, values)
            if start == 0:
                self._write_settings(values)
            self._bar = tqdm(
                total=settings.steps, initial=start, desc="train", unit="step", disable=None, dynamic_ncols=True
            )

    def _reset(self) -> None:
        self._loss_sums.zero_()
        self._loss_counts.zero_()
        self._norm_sum.zero_()
        self._norm_count.zero_()
        self._begun = time.perf_counter()
        self._waited = self._saving = self._validating = 0.0
        self._steps = 0

    def _write_settings(self, settings: dict[str, Any]) -> None:
        """Fill TensorBoard's page of hyperparameters, with the metrics by which it compares runs."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, int | float | bool) else str(value) for name, value in settings.items()
        }
        compared = ("train/loss", "validation/rotation_error_deg", "validation/psnr")
        for summary in hparams(plain, dict.fromkeys(compared, 0.0)):
            self._board.file_writer.add_summary(summary)

    def after_step(self, done: StepResult) -> None:
        """Add a step. Losses and gradient norms that are not finite do not count."""
        bins, finite = time_bin(done.t), done.losses.isfinite()
        self._loss_sums.index_add_(0, bins, torch.where(finite, done.losses, 0.0).double())
        self._loss_counts.index_add_(0, bins, finite.double())
        self._norm_sum += torch.where(done.ok, done.gradient_norm, 0.0)
        self._norm_count += done.ok
        self._waited += done.waited
        self._steps += 1
        if self._bar is not None:
            self._bar.update()

    def observe_checkpoint(self, seconds: float) -> None:
        """Add the time for which saving a checkpoint has paused the training."""
        self._saving += seconds

    def observe_validation(self, seconds: float) -> None:
        """Add the time for which a validation has paused the training."""
        self._validating += seconds

    def write_line(self, step: int, lr: float, loss_scale: float | None, left_out: int = 0) -> None:
        """Write the averages since the last line; `left_out`: of all `step` steps, how many changed nothing."""
        sums, counts = self._ranks.sum(torch.stack([self._loss_sums, self._loss_counts]))
        norm_sum, norm_count = self._norm_sum.item(), self._norm_count.item()
        own_seconds = time.perf_counter() - self._begun - self._saving - self._validating
        waited, seconds = self._ranks.sum(torch.tensor([self._waited, own_seconds], dtype=torch.float64)).tolist()
        scalars = {"loss": float(sums.sum() / counts.sum())} if counts.any() else {}
        if "loss" in scalars:
            self._watch_loss(step, scalars["loss"])
        scalars |= {"loss_spikes": float(self._spikes)}
        scalars |= {"lr": lr, "steps_left_out": float(left_out)}
        scalars |= {name: float(sums[i] / counts[i]) for i, name in enumerate(BIN_NAMES) if counts[i] > 0}
        if norm_count:
            scalars["gradient_norm"] = norm_sum / norm_count
        if loss_scale is not None:
            scalars["loss_scale"] = loss_scale
        scalars["samples_per_second"] = self._steps * self._global_batch / own_seconds
        scalars["data_wait_share"] = waited / seconds
        speed = self._speed(scalars["samples_per_second"], own_seconds)
        self._write(step, {f"train/{name}": value for name, value in scalars.items()} | speed)
        if self._bar is not None:
            loss = scalars.get("loss", math.nan)
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            if self._bar.disable:
                log.info("step %d: loss %.4f, %.0f samples/s", step, loss, scalars["samples_per_second"])
        self._reset()

    def _watch_loss(self, step: int, loss: float) -> None:
        """Warn of a loss far above those of the lines before; it does not count as usual afterwards."""
        usual = median(self._recent) if len(self._recent) >= FEWEST else math.inf
        if self._spike is None or loss <= self._spike * usual:
            self._recent.append(loss)
            return
        self._spikes += 1
        if self._ranks.rank == 0:
            log.warning(
                "step %d: loss %.4f is %.1f times the median of the last %d lines (%.4f); a lower train.optimizer.lr "
                "or train.optimizer.clip_norm keeps it down",
                *(step, loss, loss / usual, len(self._recent), usual),
            )

    def _speed(self, samples_per_second: float, seconds: float) -> dict[str, float]:
        """How well this machine is used. Memory is the peak so far; MFU is there for listed GPUs only."""
        if self._device.type == "cuda":
            memory = float(torch.cuda.max_memory_allocated(self._device))
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
        speed = {"checkpoint_share": self._saving / (seconds + self._saving), "memory_gb": memory / 1e9}
        if self._flops is not None:
            rate = samples_per_second * self._flops / self._ranks.world  # operations a second of one device
            speed |= {"tflops_per_device": rate / 1e12} | ({} if self._peak is None else {"mfu": rate / self._peak})
        return {f"train_speed/{name}": value for name, value in speed.items()}

    def write_scalars(self, step: int, scalars: dict[str, float], group: str) -> None:
        """Write a line of metrics.jsonl and TensorBoard scalars. A value that is not finite is null in the line."""
        self._write(step, {f"{group}/{name}": value for name, value in scalars.items()})

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self._lines is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
            self._lines.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._lines.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(scalars, step=step)

    def write_error_curve(self, step: int, name: str, errors: Tensor) -> None:
        """Plot in TensorBoard the share of views whose error [views], in degrees, is below the abscissa."""
        if self._board is None:
            return
        from matplotlib.figure import Figure

        ordered = errors.double().sort().values.cpu()
        figure = Figure(figsize=(5.0, 3.2), dpi=110, layout="constrained")
        axes = figure.subplots()
        shares = torch.arange(len(ordered) + 1).numpy() / len(ordered)
        axes.plot([0.1, *ordered.tolist()], shares, drawstyle="steps-post")
        axes.set(xscale="log", xlim=(0.1, 180.0), ylim=(0.0, 1.0), xlabel="rotation error in degrees")
        axes.set(
            ylabel=f"share of {len(ordered)} views", title=f"step {step}, median {float(ordered.median()):.3g} deg"
        )
        axes.grid(alpha=0.3, which="both")
        self._board.add_figure(name, figure, step)

    def write_picture(self, step: int, name: str, picture: Tensor) -> None:
        """A picture [3, H, W] in [0, 1] for TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, picture, step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._lines is not None and self._bar is not None:
            self._lines.close()
            self._board.close()
            self._bar.close()
        if self._tracker is not None:
            self._tracker.finish()


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl after `step`, and damaged ones, such as a last line that was cut."""
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    kept = "".join(line for line in lines if line.endswith("\n") and _step_of(line) <= step)
    write_atomically(path, lambda temporary: temporary.write_text(kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_tracker(name: str) -> None:
    """ConfigError if the tracker called `name` is not installed; Accelerate would ignore it silently."""
    from accelerate.tracking import get_available_trackers

    if name not in [str(each.value) if hasattr(each, "value") else str(each) for each in get_available_trackers()]:
        raise ConfigError(f"train.tracker = '{name}': the package is not installed; pip install it, or remove the key")


def open_tracker(name: str | None, run: Path, run_name: str, settings: dict[str, Any]) -> Any:
    """Accelerate's tracker called `name`, with the settings; None for none. ConfigError if it is not installed."""
    if name is None:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    check_tracker(name)
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    tracker = tracker_class(run_name, **({"logging_dir": run} if tracker_class.requires_logging_directory else {}))
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(settings)
    return tracker
