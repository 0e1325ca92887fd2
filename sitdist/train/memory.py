"""How much memory a run needs on each device, and its checkpoints on disk: estimated beforehand, and measured.

Estimates count weights, gradients, the optimizer's state and averages in float32, and the activations that the backward
pass needs; not the codec, workspaces, or what the allocator cannot use (leave a fifth).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sitdist.config.experiment import Config
from sitdist.io.files import require_memory
from sitdist.model.sit import SiT

ACTIVATION_BYTES = 34  # a token, channel and block in 16 bits (Korthikanti et al. 2022, eq. 2, without the scores)
KEPT = {"off": 1.0, "selective": 0.7, "all": 0.06}  # of the activations; roughly
FLOAT = 4  # bytes


def parameters(model: SiT) -> int:
    """The number of weights."""
    return sum(each.numel() for each in model.parameters())


def state_bytes(model: SiT, backend: str, world: int, optimizer: int = 2, averages: int = 1) -> int:
    """Bytes on each of `world` devices of weights, gradients, optimizer and averages.

    `optimizer`: numbers of state a weight (AdamW: 2). `averages`: how many, the EMA among them.
    """
    count = parameters(model)
    share = count / world
    if backend == "fsdp2":
        largest = max(sum(each.numel() for each in block.parameters()) for block in model.blocks)
        gathered = 3 * largest if world > 1 else 0  # two blocks' weights (one ahead), one's gradients
        return int(FLOAT * ((2 + optimizer + averages) * share + gathered))
    if backend.startswith("zero") and world > 1:
        gradients = share if backend == "zero2" else count
        return int(FLOAT * ((1 + averages) * count + gradients + (1 + optimizer) * share))
    return FLOAT * (2 + optimizer + averages) * count


def activation_bytes(model: SiT, samples: int, fp32: bool, kept: str = "off") -> int:
    """Bytes of what `samples` samples keep for the backward pass, with activation checkpointing `kept`; roughly."""
    tokens, width = model.pos_embed.shape[1:]
    return int(samples * tokens * width * len(model.blocks) * ACTIVATION_BYTES * (2 if fp32 else 1) * KEPT[kept])


def memory_estimate(config: Config, model: SiT, micro: int, backend: str = "ddp", world: int = 1) -> int:
    """Bytes on each device of a run with `micro` samples at a time; a rough number."""
    return sum(_state_and_activations(config, model, micro, backend, world))


def check_memory(config: Config, model: SiT, micro: int, backend: str, world: int) -> None:
    """OutOfMemoryError if a run on CPUs lacks memory for what it adds to its weights; a cautious bound."""
    state, activations = _state_and_activations(config, model, micro, backend, world)
    require_memory(
        max(0, state - FLOAT * parameters(model)) + activations // 2,
        f"training {parameters(model) / 1e6:,.1f} M weights with {micro} samples at a time",
        "set train.max_batch_per_device lower, train.activation_checkpointing: all, or take a smaller model",
    )


def _state_and_activations(config: Config, model: SiT, micro: int, backend: str, world: int) -> tuple[int, int]:
    train = config.train
    return (
        state_bytes(model, backend, world, optimizer_numbers(config), 1 + more_averages(config)),
        activation_bytes(model, micro, train.precision == "fp32", train.activation_checkpointing),
    )


def checkpoint_bytes(config: Config, model: SiT) -> int:
    """Bytes of a checkpoint: weights, their average, the optimizer's state, and further averages."""
    return FLOAT * parameters(model) * (2 + optimizer_numbers(config) + more_averages(config))


def optimizer_numbers(config: Config) -> int:
    """Numbers of state that the optimizer keeps for each weight."""
    optimizer = config.train.optimizer
    return 2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0)


def more_averages(config: Config) -> int:
    """How many averages the run keeps beside the EMA."""
    averages = config.train.averages
    return 0 if averages is None else len(averages.decays) + len(averages.sigma_rels)


def bytes_held(model: nn.Module) -> int:
    """Bytes that stay between the steps: weights, their average, and AdamW's two moments."""
    return 4 * sum(each.numel() * each.element_size() for each in model.parameters())


def memory_of_step(step: Callable[[], Any], state: int, device: torch.device) -> int | None:
    """`state` and the peak of a step above the memory held before it, in bytes; None if the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return state + torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux, proc(5))
        before = _resident("VmRSS")
        step()
        return state + _resident("VmHWM") - before
    except (OSError, LookupError):
        return None


def _resident(field: str) -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024
