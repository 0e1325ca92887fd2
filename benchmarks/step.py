"""How fast the trainer is, beside the plain loops of `plain_loop`: pairs of both in turn, in one run.

Other work on the machine meets both sides of a pair alike, so the median of the pairs' ratios holds where times do not.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.baseline import Baseline, open_baseline
from benchmarks.measure import machine, seconds_of
from benchmarks.plain_loop import SD_CHANNELS
from sitdist.build.writer import build
from sitdist.config.experiment import Config
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import load_manifest
from sitdist.distributed.accelerator import computes_in_bf16, processes
from sitdist.distributed.signals import StopSignal
from sitdist.errors import ConfigError
from sitdist.model.flops import listed_peak, training_flops
from sitdist.runs.build import build_endpoint, build_model
from sitdist.train.memory import bytes_held, memory_of_step, parameters
from sitdist.train.trainer import Trainer

ENDLESS = 10**6  # steps: no last one, which would save
LEARNING = {"optimizer": {"lr": 1e-4, "clip_norm": None}, "schedule": {"kind": "constant"}}
BASELINES = ("latents", "vae")


def usual_backends() -> tuple[str, ...]:
    """fp32, and bf16 where the device computes in it; emulated, a step may take minutes."""
    return ("fp32", "bf16") if computes_in_bf16(cpu=not torch.cuda.is_available()) else ("fp32",)


@dataclass(frozen=True)
class BenchOptions:
    """One model at one batch, the backends to time, and how often."""

    model: str = "SiT-S/2"
    latent: int = 16
    batch: int = 32
    backends: tuple[str, ...] = field(default_factory=usual_backends)
    baseline: str = "latents"
    pairs: int = 5
    steps: int = 1
    vae_channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Speed:
    """Seconds of every step of both sides, pair by pair; memory in bytes, None where it cannot be measured."""

    backend: str
    ours: list[float]
    baseline: list[float]
    memory: int | None

    @property
    def ratio(self) -> float:
        """Speed relative to the baseline: the median over the pairs."""
        return statistics.median(slow / fast for slow, fast in zip(self.baseline, self.ours, strict=True))


def bench_train(options: BenchOptions) -> str:
    """The report: the machine, the model, and a line a backend."""
    if options.baseline not in BASELINES:
        raise ConfigError(f"--baseline {options.baseline}: unknown; choose one of {', '.join(BASELINES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        configs = [make_config(options, backend, place) for backend in options.backends]
        build(parse(Recipe, make_recipe(options), "bench"), place / "data")
        manifest = load_manifest(place / "data")
        with torch.device("meta"):
            model = build_model(configs[0].model, manifest, build_endpoint(configs[0].flow))
        with open_baseline(configs[0], _vae_channels(options), device) as plain:
            baseline_memory = plain.memory()
            named = zip(options.backends, configs, strict=True)
            speeds = [_time_backend(name, config, options, plain, place / "run" / name) for name, config in named]
    flops = training_flops(model) * options.batch
    what = {"latents": "precomputed latents", "vae": "a VAE in the step"}[options.baseline]
    lines = [
        machine(),
        "",
        f"{options.model}, {parameters(model) / 1e6:.1f} M parameters, latents 4x{options.latent}x{options.latent}, "
        f"batch {options.batch}, {flops / 1e9:,.0f} GFLOP per step; "
        f"medians of {options.pairs} pairs of {options.steps} steps",
        f"{'':<40}{'steps/s':>9}{'samples/s':>11}{'MFU':>8}{'memory GB':>11}{'ratio':>8}  lowest to highest",
    ]
    peaks = {precision: peak_flops(device, precision) for precision in {"fp32", *_precisions(options)}}
    shared = [seconds for speed in speeds for seconds in speed.baseline]
    lines.append(_line(f"plain loop, fp32, {what}", shared, options.batch, flops / peaks["fp32"], baseline_memory))
    for speed in speeds:
        ideal = flops / peaks[speed.backend.partition("-")[0]]
        pairs = sorted(slow / fast for slow, fast in zip(speed.baseline, speed.ours, strict=True))
        line = _line(f"sitdist, {speed.backend}", speed.ours, options.batch, ideal, speed.memory)
        lines.append(f"{line}{speed.ratio:>8.2f}  {pairs[0]:.2f} to {pairs[-1]:.2f}")
    measured = "" if listed_peak(_name(device), "bf16") else ", as large matrix products reach here"
    told = ", ".join(f"{peak / 1e12:.3g} in {precision}" for precision, peak in sorted(peaks.items()))
    return "\n".join([*lines, f"MFU: of {told} TFLOP/s{measured}; memory: weights and state, and the peak of a step"])


def _precisions(options: BenchOptions) -> list[str]:
    return [backend.partition("-")[0] for backend in options.backends]


def _line(name: str, seconds: list[float], batch: int, ideal: float, memory: int | None) -> str:
    """`ideal`: the seconds of a step of matrix products alone, at the device's peak."""
    median = statistics.median(seconds)
    shown = "-" if memory is None else f"{memory / 1e9:.2f}"
    return f"{name:<40}{1 / median:>9.3f}{batch / median:>11.1f}{ideal / median:>8.1%}{shown:>11}"


def make_config(options: BenchOptions, backend: str, place: Path) -> Config:
    """The experiment of a backend: a precision and optionally a compile mode, such as bf16-blocks."""
    precision, _, compiled = backend.partition("-")
    train = {"steps": ENDLESS, "global_batch": options.batch, "log_every": ENDLESS, **LEARNING}
    train |= {"precision": precision, "compile": compiled or "off"}
    values: dict[str, Any] = {
        "name": "bench",
        "data": str(place / "data"),
        "model": {"preset": options.model},
        "flow": {"sigma": 1.0, "share_at_one": 0.0, "share_at_zero": 0.0},
        "train": train,
    }
    return parse(Config, values, f"--model {options.model}, backend {backend}")


def make_recipe(options: BenchOptions) -> dict[str, Any]:
    """Views of the built-in object with latents of the given size; their content does not matter."""
    return {
        "name": "bench",
        "image_size": 4 * options.latent,
        "codec": {"kind": "pca", "patch": 4, "fit_views": 16},
        "val_views": 0,
        "splits": {"train": {"kind": "scene", "views": 2 * options.batch, "supersample": 1}},
    }


def _vae_channels(options: BenchOptions) -> tuple[int, ...] | None:
    return (options.vae_channels or SD_CHANNELS) if options.baseline == "vae" else None


def _time_backend(name: str, config: Config, options: BenchOptions, plain: Baseline, run: Path) -> Speed:
    settings = config.train
    with processes(settings.precision, settings.deterministic) as (accelerator, ranks):
        trainer, stop = Trainer(config, run, accelerator, ranks), StopSignal()  # no handler: ^C ends it

        def step(count: int = 1) -> None:
            trainer.run_steps(stop, until=trainer.step + count)

        step()  # warm up
        memory = memory_of_step(step, bytes_held(trainer.state.model), accelerator.device)
        pairs = [_pair(step, plain, options.steps, accelerator.device) for _ in range(options.pairs)]
        trainer.close()
    return Speed(name, [ours for ours, _ in pairs], [theirs for _, theirs in pairs], memory)


def _pair(step: Callable[[int], None], plain: Baseline, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds per step of ours, then of the baseline, each after a step that refills the caches."""
    step(1)
    ours = seconds_of(lambda: step(steps), device) / steps
    return ours, plain.seconds(steps)


# ------------------------------------------------------------------------------------------------------- peak rate


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second: from the data sheet of a listed GPU, else measured with large matrix products."""
    listed = listed_peak(_name(device), precision)
    if listed is not None:
        return listed
    size = 4096 if device.type == "cuda" else 1024
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = [seconds_of(lambda: a @ a, device) for _ in range(8)]
    return 2 * size**3 / min(times)
