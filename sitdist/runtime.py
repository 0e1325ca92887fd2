"""Processes, devices, logging and signals: how a command finds out where it runs and when it is asked to stop."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from tqdm import tqdm

from sitdist.errors import ConfigError, ProcessError, RunInterrupted, SitdistError, as_told, one_line, shortened
from sitdist.heartbeat import Heartbeat

log = logging.getLogger("sitdist")

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
BACKEND_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
OF_A_COLLECTIVE = re.compile(r"gloo|NCCL|c10d|[Cc]onnection (closed|reset)|Broken pipe|[Tt]imed out")
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


def helper_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that work beside the main one, each of which computes alone.

    More OpenMP threads than cores do not wait awake for their next piece of work, and then all that is computed on the
    CPU is slower.
    """
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


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
def processes(precision: str = "fp32", deterministic: bool = False) -> Iterator[tuple[Accelerator, Agreement]]:
    """Within `with`: this process is one of those that the launcher started; afterwards it has left their group.

    A process that fails alone leaves without a word to the others, who may never come to where it would wait for them.
    """
    accelerator = make_accelerator(precision, deterministic)
    log_on_main(accelerator)
    if precision == "bf16" and accelerator.device.type == "cpu" and not computes_in_bf16(cpu=True):
        log.warning("train.precision = 'bf16': this CPU emulates it, many times slower than fp32; auto would take fp32")
    agreement = Agreement(accelerator)
    try:
        yield accelerator, agreement
    except (SitdistError, RunInterrupted) as error:
        if isinstance(error, RunInterrupted) or (error.of_rank is not None and not isinstance(error, ProcessError)):
            _leave(accelerator, agreement)
        raise
    except RuntimeError as error:
        if OF_A_COLLECTIVE.search(str(error)):
            agreement.blame_the_dead(error)
        raise
    _leave(accelerator, agreement)


def _leave(accelerator: Accelerator, agreement: Agreement) -> None:
    accelerator.wait_for_everyone()
    agreement.close()
    accelerator.end_training()


class Agreement:
    """Small decisions that all processes take together, over gloo, so that no GPU has to wait for them.

    Every process calls every method. ProcessError where another one has ended, or does not come within the process
    group's timeout (half an hour).
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        """Of the accelerator's processes; None: this one is alone."""
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes
        self._group: Any = dist.new_group(backend="gloo") if self.world > 1 else None
        self._heartbeat = Heartbeat(self.rank, self.world) if self.world > 1 else None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for every process at the end of the block; an error that one of them met there is raised on all.

        The block itself must not wait for other processes.
        """
        if self.world == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.any(failure is not None)[0]:
            self.raise_first(failure)

    def raise_first(self, failure: Exception | None) -> NoReturn:
        """Raise on every process what one of them met; `failure` is what this one has met, if anything."""
        told = None if failure is None else as_told(failure)
        bug = failure is not None and told is None
        if bug:
            told = ProcessError(f"{type(failure).__name__}: {shortened(str(failure))}; it says where its traceback is")
        errors = [(rank, error) for rank, error in enumerate(self.gather(told)) if error is not None]
        rank, first = min(errors, key=lambda entry: not isinstance(entry[1], ProcessError))  # bugs before the rest
        if failure is not None and bug:
            raise failure  # the process that met it shows where
        first.of_rank = rank
        raise first from None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on at least one process."""
        return self.begin_any(*flags)()

    def begin_any(self, *flags: bool) -> Callable[[], tuple[bool, ...]]:
        """Begin to ask what `any` asks; what is returned gives the answer, and waits for it if it has to."""
        if self.world == 1:
            return lambda: flags
        raised = torch.tensor(flags, dtype=torch.int32)
        work = self._meet(dist.all_reduce, raised, op=dist.ReduceOp.MAX, async_op=True)

        def answer() -> tuple[bool, ...]:
            self._guarded(work.wait)
            return tuple(bool(flag) for flag in raised.tolist())

        return answer

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes of a small tensor, on the CPU."""
        total = values.detach().to("cpu", copy=True)
        if self.world > 1:
            self._meet(dist.all_reduce, total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in rank order."""
        values = [value] * self.world
        if self.world > 1:
            self._meet(dist.all_gather_object, values, value)
        return values

    def of_main(self, value: Any) -> Any:
        """The main process's value."""
        values = [value]
        if self.world > 1:
            self._meet(dist.broadcast_object_list, values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            self._meet(dist.barrier)

    def _meet(self, collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._guarded(partial(collective, *arguments, group=self._group, **options))

    def _guarded(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except RuntimeError as error:
            self.blame_the_dead(error)
            raise ProcessError(
                f"another process does not answer ({_first_line(error)}); what it printed says why"
            ) from None

    def blame_the_dead(self, error: RuntimeError) -> None:
        """ProcessError that names the processes that have ended, if there are such; `error` is what came of it."""
        dead = self._heartbeat.silent() if self._heartbeat is not None else []
        if dead:
            raise ProcessError(
                f"{', '.join(dead)} ended or no longer answers, so that this one stops too ({_first_line(error)}); "
                "what it printed says why, and the same command goes on from the last checkpoint"
            ) from None

    def close(self) -> None:
        """No process waits for another any more."""
        if self._heartbeat is not None:
            self._heartbeat.close()


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


class StopSignal:
    """Within `with`: SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    Launchers pass on what a terminal has already sent, so a signal often comes twice: the later ones change nothing.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._request) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)


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
