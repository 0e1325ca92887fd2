"""Processes, devices, logging and signals: how a command finds out where it runs and when it is asked to stop."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from tqdm import tqdm

from sitdist.distributed.ranks import OF_A_COLLECTIVE, Ranks
from sitdist.errors import ConfigError, ProcessError, RunInterrupted, SitdistError, one_line

log = logging.getLogger("sitdist")
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
BACKEND_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(precision: str = "fp32", deterministic: bool = False) -> Accelerator:
    """The accelerator of this process; starts the process group where a launcher started several processes.

    `precision`: auto, fp32, bf16 or fp16; `accelerator.mixed_precision` tells what it came to (no for fp32).

    Without a GPU, or with ACCELERATE_USE_CPU=true, everything runs on the CPU over gloo. ConfigError where the
    launcher's settings cannot be honoured: fp16 on a CPU, a backend that there is not (see `backend_of_launcher`), or
    processes that do not see each other. Accelerate is not told of the backend: the trainer shares out what is to be
    shared, and on a CPU too, where Accelerate would silently leave it.
    """
    use_cpu = _use_cpu()
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(use_cpu) else "fp32"
    if precision == "fp16" and use_cpu:
        raise ConfigError("train.precision = 'fp16': there is no fp16 training on a CPU; use fp32 or bf16")
    if precision == "bf16" and not use_cpu and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"train.precision = 'bf16': {torch.cuda.get_device_name()} has no bf16; use fp32 or fp16")
    backend_of_launcher(os.environ)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)

    # Accelerate keeps one state per process; a second command in the same process starts from a clean one.
    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings(), _hidden(*BACKEND_VARIABLES):
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
        accelerator = Accelerator(cpu=use_cpu, mixed_precision=MIXED_PRECISION[precision])
    if accelerator.distributed_type not in SUPPORTED:
        raise ConfigError(
            f"distributed type {accelerator.distributed_type.value}: not supported; "
            "start plain data parallelism (see launch/README.md)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ConfigError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS = {accelerator.gradient_accumulation_steps}: accumulation follows "
            "from train.global_batch and train.max_batch_per_device; unset it"
        )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ConfigError(
            f"the launcher started WORLD_SIZE = {expected} processes but they form {accelerator.num_processes}; "
            "start them as launch/README.md says"
        )
    return accelerator


def backend_of_launcher(variables: Mapping[str, str]) -> str:
    """ddp, fsdp2, zero1 or zero2, as `accelerate launch` says it in the environment; ConfigError for all else."""

    def says(name: str) -> str:
        return variables.get(name, "").lower()

    def refuse(name: str, remedy: str) -> NoReturn:
        raise ConfigError(f"{name} = {variables[name]}: not supported; {remedy} (see launch/README.md)")

    if says("ACCELERATE_USE_MEGATRON_LM") == "true":
        refuse("ACCELERATE_USE_MEGATRON_LM", "start with launch/ddp.yaml or launch/fsdp2.yaml")
    if says("ACCELERATE_USE_FSDP") == "true":
        if says("FSDP_VERSION") != "2":
            raise ConfigError(
                f"FSDP_VERSION = {variables.get('FSDP_VERSION', '1')}: not supported; set fsdp_version: 2 as "
                "launch/fsdp2.yaml does"
            )
        if says("FSDP_OFFLOAD_PARAMS") == "true":
            refuse("FSDP_OFFLOAD_PARAMS", "weights stay on their device; use more of them")
        return "fsdp2"
    if says("ACCELERATE_USE_DEEPSPEED") == "true":
        if says("ACCELERATE_DEEPSPEED_CONFIG_FILE") not in ("", "none"):
            raise ConfigError(
                "deepspeed_config_file: not supported; give zero_stage alone, as launch/zero2.yaml does: all else is "
                "the experiment's, or follows from it"
            )
        for name in ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"):
            if says(name) not in ("", "none"):
                refuse(name, "nothing is kept on another device; use launch/fsdp2.yaml on more of them")
        stage = says("ACCELERATE_DEEPSPEED_ZERO_STAGE") or "2"
        if stage not in ("1", "2"):
            raise ConfigError(
                f"ZeRO stage {stage}: not supported; stages 1 and 2 are, and launch/fsdp2.yaml shares out weights too, "
                "as stage 3 would"
            )
        return f"zero{stage}"
    return "ddp"


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Within `with`: the environment without these variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _use_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return asked or not torch.cuda.is_available()


def computes_in_bf16(cpu: bool) -> bool:
    """Whether the CPU, or else the GPU, has instructions for bfloat16 instead of emulating it."""
    if not cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def count_nodes(world: int) -> int:
    """How many nodes these processes run on, by what the launcher says; ConfigError where it does not fit."""
    local = os.environ.get("LOCAL_WORLD_SIZE", str(world))
    if not local.isdigit() or int(local) == 0 or world % int(local):
        raise ConfigError(
            f"LOCAL_WORLD_SIZE = {local}: {world} processes cannot be so many on every node; start the same number on "
            "each, or set reader.split_by_node to false"
        )
    return world // int(local)


@contextmanager
def processes(precision: str = "fp32", deterministic: bool = False) -> Iterator[tuple[Accelerator, Ranks]]:
    """Within `with`: this process is one of those that the launcher started; afterwards it has left their group.

    A process that fails alone leaves without a word to the others, who may never come to where it would wait for them.
    """
    accelerator = make_accelerator(precision, deterministic)
    log_on_main(accelerator)
    if precision == "bf16" and accelerator.device.type == "cpu" and not computes_in_bf16(cpu=True):
        log.warning("train.precision = 'bf16': this CPU emulates it, many times slower than fp32; auto would take fp32")
    ranks = Ranks(accelerator)
    try:
        yield accelerator, ranks
    except (SitdistError, RunInterrupted) as error:
        if isinstance(error, RunInterrupted) or (error.of_rank is not None and not isinstance(error, ProcessError)):
            _leave(accelerator, ranks)
        raise
    except RuntimeError as error:
        if OF_A_COLLECTIVE.search(str(error)):
            ranks.blame_the_dead(error)
        raise
    _leave(accelerator, ranks)


def _leave(accelerator: Accelerator, ranks: Ranks) -> None:
    accelerator.wait_for_everyone()
    ranks.close()
    accelerator.end_training()


class _StderrLines(logging.Handler):
    """Messages on stderr, above a progress bar that may be there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(one_line(self.format(record)), file=sys.stderr)


def log_on_main(accelerator: Accelerator) -> None:
    """Show messages of level INFO and above on stderr, those of the main process only; warnings of every process."""
    level = logging.INFO if accelerator.is_main_process else logging.WARNING
    log.setLevel(level)
    if not any(isinstance(handler, _StderrLines) for handler in log.handlers):
        handler = _StderrLines()
        handler.setFormatter(logging.Formatter("sitdist: %(message)s"))
        log.addHandler(handler)
        log.propagate = False
