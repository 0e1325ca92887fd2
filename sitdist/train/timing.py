"""How long a piece of work takes, and how much memory."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, and what it leaves the device to do."""
    _finish(device)
    begun = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - begun


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_held(model: nn.Module) -> int:
    """Of what stays between the steps: weights, their average, and AdamW's two moments."""
    return 4 * sum(each.numel() * each.element_size() for each in model.parameters())


def memory_of_step(step: Callable[[], Any], state: int, device: torch.device) -> int | None:
    """`state` and what a step takes above what is held before it, in bytes; None where the system does not tell."""
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
