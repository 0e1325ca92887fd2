"""A closer look at some steps: norms of every layer at an interval, and a profile of a few steps."""

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

from sitdist.config.experiment import ProfileConfig
from sitdist.distributed.local_shards import local_shard
from sitdist.model.sit import SiT
from sitdist.train.hooks import Hook, StepResult
from sitdist.train.monitor import Monitor

log = logging.getLogger(__name__)


class LayerNorms(Hook):
    """Every `every` steps: the norm of each layer's gradient, and the root mean square of each block's output.

    Gradients are those of all processes, before clipping; DeepSpeed frees them, so with it there are none. Outputs are
    those of this process's last micro-batch. `scaler` is that of fp16.
    """

    def __init__(self, model: SiT, every: int | None, monitor: Monitor, scaler: GradScaler | None = None) -> None:
        self._every, self._monitor, self._scaler = every, monitor, scaler
        self._layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._layers.setdefault(layer_of(name), []).append(parameter)
        self._outputs: dict[str, Tensor] = {}
        self._wanted = False
        self.norms: dict[str, float] = {}
        if every is not None:
            for place, block in enumerate(model.blocks):
                block.register_forward_hook(self._hook(f"block_{place:02d}"))

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            if self._wanted:
                self._outputs[name] = output.detach().float().square().mean().sqrt()

        return keep

    def before_step(self, step: int) -> None:
        self._wanted = self._every is not None and (step + 1) % self._every == 0

    def after_backward(self) -> None:
        if not self._wanted:
            return
        self._wanted = False
        gradients = {
            name: [each.grad for each in parameters if each.grad is not None]
            for name, parameters in self._layers.items()
        }
        gradients = {name: of_layer for name, of_layer in gradients.items() if of_layer}
        norms = {f"activation/{name}": value for name, value in self._outputs.items()}
        if gradients:
            own = [torch._foreach_norm([local_shard(each) for each in of_layer]) for of_layer in gradients.values()]
            squares = torch.stack([torch.stack(each).norm() for each in own]).square()
            if any(isinstance(each[0], DTensor) for each in gradients.values()):
                dist.all_reduce(squares)
            scaled = squares.sqrt() / (1.0 if self._scaler is None else self._scaler.get_scale())
            norms |= {f"gradient/{name}": norm for name, norm in zip(gradients, scaled, strict=True)}
        self.norms = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))

    def after_step(self, done: StepResult) -> None:
        if self.norms:
            self._monitor.write_scalars(done.step, self.norms, "train_layers")
            self.norms = {}


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: block_00, block_01, ..., or the name of the module."""
    first, _, rest = parameter.partition(".")
    return f"block_{int(rest.partition('.')[0]):02d}" if first == "blocks" else first


class StepProfile(Hook):
    """A profile of the steps that the config names: a Chrome trace, and on a GPU a snapshot of its memory.

    Both go to RUN/profile, one file per process. View them with https://ui.perfetto.dev and
    https://pytorch.org/memory_viz.
    """

    def __init__(self, run: Path, config: ProfileConfig | None, rank: int, device: torch.device) -> None:
        self._folder, self._config, self._rank = run / "profile", config, rank
        self._on_gpu = device.type == "cuda"
        self._profile: Any = None

    def before_step(self, step: int) -> None:
        if self._config is None or step != self._config.start:
            return
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.__enter__()

    def after_step(self, done: StepResult) -> None:
        if self._profile is None or self._config is None or done.step < self._config.start + self._config.steps:
            return
        self._profile.__exit__(None, None, None)
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"steps_{self._config.start}_to_{done.step - 1}_rank_{self._rank}.json"
        self._profile.export_chrome_trace(str(trace))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(trace.with_suffix(".memory.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        log.info("wrote %s", trace)

    def close(self) -> None:
        """End an unfinished profile; nothing is written."""
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None
