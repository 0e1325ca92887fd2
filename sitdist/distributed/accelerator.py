"""Processes, devices, backends and logging: where a command runs, as its launcher says."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from tqdm import tqdm

from sitdist.distributed.ranks import COLLECTIVE_ERROR, Ranks
from sitdist.errors import ConfigError, ProcessError, RunInterrupted, SitdistError, one_line

if TYPE_CHECKING:
    from sitdist.distributed.ddp import DDP

log = logging.getLogger("sitdist")
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
BACKEND_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(precision: str = "fp32", deterministic: bool = False) -> Accelerator:
    """The accelerator of this process; starts the process group where a launcher started several processes.

    `precision`: auto, fp32, bf16 or fp16; `accelerator.mixed_precision` holds the choice (no for fp32).

    Without a GPU, or with ACCELERATE_USE_CPU=true, everything runs on the CPU over gloo. ConfigError if the launcher's
    settings cannot be met: fp16 on a CPU, an unknown backend (see `backend_of_launcher`), or processes that do not see
    each other. The backend is hidden from Accelerate, which would silently ignore it on a CPU: see `make_backend`.
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
    """ddp, fsdp2, zero1 or zero2, as `accelerate launch` sets it in the environment; ConfigError for others."""

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


def make_backend(name: str, accelerator: Accelerator) -> DDP:
    """The backend called `name`; a single process shards nothing.

        ddp      every process holds weights, gradients and optimizer state (DDP)
        fsdp2    every process holds its shard of each (torch's fully_shard)
        zero1    weights and gradients are full everywhere, the optimizer's state is sharded (DeepSpeed)
        zero2    the gradients too

    ConfigError if it does not support the precision, or DeepSpeed is not installed.
    """
    from sitdist.distributed.ddp import DDP
    from sitdist.distributed.fsdp2 import FSDP2
    from sitdist.distributed.zero import Zero

    if name == "ddp" or accelerator.num_processes == 1:
        return DDP(accelerator)
    if accelerator.scaler is not None:
        raise ConfigError(
            f"train.precision = 'fp16': not together with {name}, which does not scale gradients; use bf16, or "
            "start plain data parallelism (launch/ddp.yaml)"
        )
    return FSDP2(accelerator) if name == "fsdp2" else Zero(accelerator, int(name.removeprefix("zero")))


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

    A process that fails alone does not wait for the others, which may never arrive.
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
        if COLLECTIVE_ERROR.search(str(error)):
            ranks.raise_if_dead(error)
        raise
    _leave(accelerator, ranks)


def _leave(accelerator: Accelerator, ranks: Ranks) -> None:
    accelerator.wait_for_everyone()
    ranks.close()
    accelerator.end_training()


class _StderrLines(logging.Handler):
    """Messages on stderr, above any progress bar."""

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
