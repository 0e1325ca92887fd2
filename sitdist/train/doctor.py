"""What a run will do and what would stop it: `sitdist doctor CONFIG`.

Problems that would appear late in a long run are checked first, then a few steps are timed in a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from sitdist.checks import whole
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml, read_yaml
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.store import store_of
from sitdist.distributed.accelerator import backend_of_launcher, processes
from sitdist.distributed.ranks import Ranks
from sitdist.distributed.signals import StopSignal
from sitdist.errors import ConfigError, SitdistError, one_line, shown
from sitdist.model.flops import training_flops
from sitdist.model.sit import SiT
from sitdist.runs.build import build_endpoint, build_model, load_matching_codec
from sitdist.train.inputs import split_batch
from sitdist.train.memory import (
    bytes_held,
    checkpoint_bytes,
    memory_estimate,
    memory_of_step,
    more_averages,
    parameters,
)
from sitdist.train.monitor import check_tracker
from sitdist.train.trainer import Trainer

TIMED_STEPS = 3


@dataclass
class Diagnosis:
    """What was found out, a line each: facts about the run, and problems that would stop it."""

    facts: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def fact(self, what: str, text: str) -> None:
        """Add something that is as it should be."""
        self.facts.append(one_line(f"{what:<14}{text}"))

    def problem(self, what: str, text: str) -> None:
        """Add something that would stop the run, with its remedy."""
        self.wrong.append(one_line(f"{what:<14}{text}"))

    @contextmanager
    def checking(self, what: str, prefix: str = "") -> Iterator[None]:
        """Within `with`: an error of sitdist is a problem of `what`; `prefix` says where, if the error does not."""
        try:
            yield
        except SitdistError as error:
            self.problem(what, f"{prefix}{str(error).removeprefix(prefix)}")

    def report(self) -> str:
        """All lines, problems last."""
        verdict = f"{len(self.wrong)} wrong:" if self.wrong else "No problems found."
        return "\n".join([*self.facts, verdict, *self.wrong])


def doctor(path: Path, overrides: list[str], launch: Path | None, out: Path) -> Diagnosis:
    """Check a config, its dataset and this machine; `out`: where the run would be. Every process calls it."""
    found = Diagnosis()
    with found.checking("config"):
        config = load_yaml(Config, path, overrides)
    if found.wrong:
        return found
    settings = config.train
    manifest: DatasetManifest | None = None
    model: SiT | None = None
    found.fact("config", f"{path}: {config.name}, {settings.steps:,} steps of {settings.global_batch} samples")
    with found.checking("dataset"):
        manifest = _check_dataset(config, found)
    if manifest is not None:
        with found.checking("model"), torch.device("meta"):
            model = build_model(config.model, manifest, build_endpoint(config.flow))
            flops = training_flops(model) * settings.global_batch
            found.fact("model", f"{parameters(model) / 1e6:.1f} M parameters, {flops / 1e9:,.0f} GFLOP per step")
    with found.checking("start"), processes(settings.precision, settings.deterministic) as (accelerator, ranks):
        world, backend = accelerator.num_processes, backend_of_launcher(os.environ)
        if launch is not None:
            with found.checking("launch", f"{launch}: "):
                world, backend = _read_launch(launch, accelerator, found)
        count = "1 process" if world == 1 else f"{world} processes"
        found.fact("processes", f"{count} ({accelerator.device.type.upper()}, {backend.upper()})")
        split = None
        with found.checking("batch"):
            split = split_batch(settings.global_batch, world, settings.max_batch_per_device)
            found.fact("batch", f"{split.local} samples per process, {split.micro} at a time")
        _check_software(config, accelerator.device, found)
        if model is not None:
            _check_disk(config, model, out, found)
            if split is not None:
                _check_memory(memory_estimate(config, model, split.micro, backend, world), accelerator.device, found)
        wrong = ranks.any(bool(found.wrong))[0]
        if accelerator.num_processes > 1:
            _measure_bandwidth(accelerator, found)
        if manifest is not None and model is not None and not wrong:
            _measure_steps(config, manifest, accelerator, ranks, found)
    return found


def _check_dataset(config: Config, found: Diagnosis) -> DatasetManifest:
    store = store_of(config)
    manifest = load_manifest(store.folder)
    load_matching_codec(store.folder / "codec", manifest, "cpu")
    count, latent = manifest.splits["train"].count, manifest.latent
    epochs = config.train.steps * config.train.global_batch / count
    shape = f"{latent.channels}x{latent.height}x{latent.width}"
    found.fact("dataset", f"{manifest.name}: {count:,} training samples of {shape}, each seen {epochs:.1f} times")
    views = manifest.splits["val"].count if "val" in manifest.splits else 0
    if config.train.validate_every is not None and views == 0:
        found.problem(
            "validation", f"{config.data} has no val split; build it with val_views, or remove validate_every"
        )
    return manifest


def _read_launch(launch: Path, accelerator: Accelerator, found: Diagnosis) -> tuple[int, str]:
    """How many processes a launch file starts, and their backend."""
    values = read_yaml(launch, "accelerate config, such as one of launch/")
    world = whole("num_processes", values.get("num_processes"), 1)
    machines = whole("num_machines", values.get("num_machines", 1), 1)
    backend, gpus = backend_of_file(values), torch.cuda.device_count()
    if accelerator.device.type == "cuda" and world > gpus * machines:
        found.problem("launch", f"{launch}: {world} processes on {machines} machines with {gpus} GPUs; start fewer")
    return world, backend


def backend_of_file(values: dict[str, Any]) -> str:
    """The backend that `accelerate launch` sets for a config file of these values; ConfigError if not supported."""
    variables: dict[str, str] = {}
    kind = str(values.get("distributed_type", "NO"))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        variables[f"ACCELERATE_USE_{kind}"] = "true"
    for prefix, section in (("", "fsdp_config"), ("ACCELERATE_DEEPSPEED_", "deepspeed_config")):
        given = values.get(section) or {}
        if not isinstance(given, dict):
            raise ConfigError(f"{section} {shown(given)}: expected a mapping; see launch/README.md")
        for name, value in given.items():
            variables[prefix + str(name).removeprefix("deepspeed_").upper()] = str(value)
    return backend_of_launcher(variables)


def _check_software(config: Config, device: torch.device, found: Diagnosis) -> None:
    if device.type == "cuda":
        kernels = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        }
        found.fact("attention", f"{', '.join(name for name, there in kernels.items() if there) or 'plain'} kernels")
    else:
        found.fact("attention", "flash kernel of the CPU, products in float32")
    if config.train.compile != "off":
        if device.type == "cuda" and find_spec("triton") is None:
            found.problem("compile", "triton is not installed; pip install triton, or set train.compile: off")
        elif device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "c++"))):
            found.problem("compile", "no C++ compiler; install g++, or set train.compile: off")
        else:
            found.fact(
                "compile", f"{config.train.compile}, by {'triton' if device.type == 'cuda' else 'a C++ compiler'}"
            )
    if config.train.tracker is not None:
        with found.checking("tracker"):
            check_tracker(config.train.tracker)


def _check_disk(config: Config, model: SiT, out: Path, found: Diagnosis) -> None:
    settings, each = config.train, checkpoint_bytes(config, model)
    count = settings.keep_checkpoints if settings.checkpoint_every else 1
    need = each * (count + 1)  # a new one is written before an old one goes
    if settings.averages is not None and settings.averages.snapshot_every is not None:
        need += 4 * parameters(model) * more_averages(config) * (settings.steps // settings.averages.snapshot_every)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    text = f"{need / 1e9:.2f} GB for {count} checkpoints of {each / 1e9:.2f} GB and what is kept; {free / 1e9:.1f} free"
    if need > free:
        found.problem("disk", f"{text} at {place}; free space, or lower train.keep_checkpoints")
    else:
        found.fact("disk", text)


def _check_memory(need: int, device: torch.device, found: Diagnosis) -> None:
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    text = f"about {need / 1e9:.2f} GB per process of {there / 1e9:.1f}"
    if need > there:
        remedy = "set train.max_batch_per_device lower, train.activation_checkpointing: all, or take a smaller model"
        found.problem("memory", f"{text}; {remedy}")
    else:
        found.fact("memory", text)


def _measure_bandwidth(accelerator: Accelerator, found: Diagnosis) -> None:
    """How fast gradients are summed; every process calls it."""
    size = 16 * 2**20  # numbers
    values = torch.ones(size, device=accelerator.device)
    dist.all_reduce(values)
    begun = time.perf_counter()
    dist.all_reduce(values)
    float(values[0])  # done
    seconds = time.perf_counter() - begun
    found.fact("between them", f"{4 * size / seconds / 1e9:.2f} GB/s of gradients summed over processes")


def time_steps(config: Config, accelerator: Accelerator, ranks: Ranks) -> tuple[float, int | None]:
    """Seconds of a step of `config`, and the memory in bytes that it needs, by a few steps in a temporary folder."""
    quiet = {"validate_every": None, "checkpoint_every": None, "tracker": None, "profile": None, "averages": None}
    train = config.train.model_copy(update={**quiet, "steps": 10**9, "log_every": 10**9})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(ranks.broadcast(folder))
        trainer = Trainer(config.model_copy(update={"train": train}), run, accelerator, ranks)
        stop = StopSignal()
        try:
            trainer.run_steps(stop, until=1)
            held = bytes_held(trainer.state.model)
            memory = memory_of_step(lambda: trainer.run_steps(stop, until=2), held, accelerator.device)
            begun = time.perf_counter()
            trainer.run_steps(stop, until=2 + TIMED_STEPS)
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - begun) / TIMED_STEPS, memory
        finally:
            trainer.close()


def _measure_steps(
    config: Config, manifest: DatasetManifest, accelerator: Accelerator, ranks: Ranks, found: Diagnosis
) -> None:
    seconds, memory = time_steps(config, accelerator, ranks)
    of_epoch = manifest.splits["train"].count / config.train.global_batch
    shown = "" if memory is None else f", {memory / 1e9:.2f} GB per process"
    found.fact("a step", f"{seconds:.3f} s, {config.train.global_batch / seconds:,.1f} samples/s{shown}")
    found.fact("an epoch", f"{of_epoch:,.1f} steps, {_duration(of_epoch * seconds)}")
    found.fact("the run", f"{config.train.steps:,} steps, {_duration(config.train.steps * seconds)}")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60.0, seconds / 3600.0
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if hours < 2 else f"{hours:.1f} h"
