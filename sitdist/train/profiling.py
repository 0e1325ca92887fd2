"""A closer look at some steps: norms of every layer at an interval, a profile of a few steps, an outside tracker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from sitdist.distributed.local_shards import local_part
from sitdist.errors import ConfigError
from sitdist.model.sit import SiT

log = logging.getLogger(__name__)


class LayerNorms:
    """Every `every` steps: the norm of each layer's gradient, and the root mean square of what each block gives.

    Those of the gradient are of all processes' samples, before clipping, and not to be had under DeepSpeed, which takes
    them away; those of the blocks are of this process's last micro-batch.
    """

    def __init__(self, model: SiT, every: int | None) -> None:
        self._every = every
        self._layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._layers.setdefault(layer_of(name), []).append(parameter)
        self._outputs: dict[str, Tensor] = {}
        self._wanted = False
        if every is not None:
            for place, block in enumerate(model.blocks):
                block.register_forward_hook(self._hook(f"block_{place:02d}"))

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            if self._wanted:
                self._outputs[name] = output.detach().float().square().mean().sqrt()

        return keep

    def begin(self, step: int) -> None:
        """Before the forward pass of step number `step` (from 0)."""
        self._wanted = self._every is not None and (step + 1) % self._every == 0

    def end(self, scaler: GradScaler | None = None) -> dict[str, float]:
        """After the backward pass: the norms, none where this step is not one to look at; `scaler` is that of fp16.

        Every process calls it.
        """
        if not self._wanted:
            return {}
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        self._wanted = False
        gradients = {
            name: [each.grad for each in parameters if each.grad is not None]
            for name, parameters in self._layers.items()
        }
        gradients = {name: of_layer for name, of_layer in gradients.items() if of_layer}
        norms = {f"activation/{name}": value for name, value in self._outputs.items()}
        if gradients:
            own = [torch._foreach_norm([local_part(each) for each in of_layer]) for of_layer in gradients.values()]
            squares = torch.stack([torch.stack(each).norm() for each in own]).square()
            if any(isinstance(each[0], DTensor) for each in gradients.values()):
                dist.all_reduce(squares)
            whole = squares.sqrt() / loss_scale
            norms |= {f"gradient/{name}": norm for name, norm in zip(gradients, whole, strict=True)}
        return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: block_00, block_01, ..., or the name of the module."""
    first, _, rest = parameter.partition(".")
    return f"block_{int(rest.partition('.')[0]):02d}" if first == "blocks" else first


class StepProfile:
    """A profile of `steps` steps from `start` on: a Chrome trace, and on a GPU a snapshot of its memory.

    Both go to RUN/profile, one file a process; https://ui.perfetto.dev and https://pytorch.org/memory_viz show them.
    """

    def __init__(self, run: Path, span: tuple[int, int] | None, rank: int, device: torch.device) -> None:
        self._folder, self._span, self._rank = run / "profile", span, rank
        self._on_gpu = device.type == "cuda"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Before step number `step` (from 0): begin, if it is the first one to be profiled."""
        if self._span is None or step != self._span[0]:
            return
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.__enter__()

    def after(self, step: int) -> None:
        """After step number `step`: write, if it was the last one to be profiled."""
        if self._profile is None or self._span is None or step + 1 < sum(self._span):
            return
        self._profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"steps_{self._span[0]}_to_{step}_rank_{self._rank}.json"
        self._profile.export_chrome_trace(str(trace))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(trace.with_suffix(".memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        log.info("wrote %s", trace)

    def close(self) -> None:
        """End a profile that the run did not finish; nothing is written."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None


def check_tracker(name: str) -> None:
    """ConfigError if the tracker called `name` is not installed, which Accelerate would pass over in silence."""
    from accelerate.tracking import get_available_trackers

    if name not in [str(each.value) if hasattr(each, "value") else str(each) for each in get_available_trackers()]:
        raise ConfigError(f"train.tracker = '{name}': the package is not installed; pip install it, or remove the key")


def open_tracker(name: str | None, run: Path, run_name: str, settings: dict[str, Any]) -> Any:
    """Accelerate's tracker called `name`, told the settings; None for none. ConfigError if it is not installed."""
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
