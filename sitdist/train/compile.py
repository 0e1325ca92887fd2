"""Makes a step faster or smaller without changing its results: compilation, recomputation, memory, garbage."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sitdist.model.sit import SiT
from sitdist.train.hooks import Hook, StepResult

BACKEND = "inductor"
CUDA_GRAPHS = {"triton.cudagraphs": True}
_ATEN = torch.ops.aten
KEPT = [  # results of matrix products: expensive to compute, and a small part of the activations
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
]
COLLECT_EVERY = 1000  # steps
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_... of malloc.h


def recompute_activations(model: SiT, which: str) -> None:
    """Let the blocks of `model` keep fewer activations, and compute the others again in the backward pass.

    all: a block keeps its inputs only. selective: it also keeps the results of its matrix products, so that only
    cheap operations run twice. off: nothing changes. The gradients are the same, bit for bit.
    """
    if which == "off":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, **options)


def compile_model(model: SiT, which: str) -> None:
    """Compile nothing (off), every block (blocks: one compilation for all), or the whole model (full), in place.

    graphs: the whole model, which on a GPU is replayed as a CUDA graph; `begin_forward` before every pass. Names of
    weights stay as they are.
    """
    parts: dict[str, list[nn.Module]] = {"off": [], "blocks": list(model.blocks), "full": [model], "graphs": [model]}
    for part in parts[which]:
        part.compile(backend=BACKEND, options=CUDA_GRAPHS if which == "graphs" else None)


def begin_forward() -> None:
    """Allow a CUDA graph to overwrite the results of the pass before."""
    torch.compiler.cudagraph_mark_step_begin()


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees (with glibc; elsewhere nothing changes).

    Otherwise glibc returns gradients and activations to the system after every step, and the system clears the pages
    again when the next step asks for them.
    """
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, -1)
        if not mallopt(_MMAP_THRESHOLD, 2**30):
            mallopt(_MMAP_THRESHOLD, 2**25)  # the most that glibc before 2.35 takes


class ScheduledCollection(Hook):
    """Collects Python's garbage every COLLECT_EVERY steps and at no other time, until `close`.

    Otherwise each process pauses at a time of its own, and all others wait for it.
    """

    def __init__(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()

    def after_step(self, done: StepResult) -> None:
        if done.step % COLLECT_EVERY == 0:
            gc.collect()

    def close(self) -> None:
        """Let Python decide again."""
        if self._was_enabled:
            gc.enable()
