"""Data parallelism: every process holds the weights, the gradients and the optimizer's state. Other backends refine it.

A checkpoint holds full tensors whatever the backend, so that a run may continue with any other, on any number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from sitdist.distributed.local_shards import full_tensor, local_shard, shard_like
from sitdist.distributed.optimizer_state import OptimizerState, load_optimizer, optimizer_tensors

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class DDP:
    """Every process holds everything, and DDP averages the gradients; also for a single process."""

    name = "ddp"
    shards_weights = False

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def setup(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        """Distribute `model` and its average, in place, and make the optimizer; every process calls it."""
        self.raw, self._clip_norm = model, clip_norm
        self.raw_optimizer = make_optimizer(list(trained_parameters(model).values()))
        self.model, self.optimizer = self._accelerator.prepare(model, self.raw_optimizer)

    @property
    def settles_buckets(self) -> bool:
        """Whether the first backward pass decides in which order gradients are summed."""
        return self._accelerator.num_processes > 1

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients are averaged over processes with the last one."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        self._accelerator.backward(loss)

    def clip_gradients(self) -> Tensor:
        """Clip to `clip_norm`; returns the norm before (0-d, on the device), which is the same on every process."""
        self._accelerator.unscale_gradients(self.optimizer)
        trained = trained_parameters(self.raw).values()
        norm = sum_of_squares(trained).sqrt()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip_norm, norm)
        return norm

    def update(self, lr: float, ok: Tensor) -> None:
        """One step of the optimizer at the rate `lr`, which changes nothing where `ok` (0-d) is false."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.raw_optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def full_tensors(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The full state dict of `model` or its average, one by one; every process iterates over all of it."""
        for name, tensor in model.state_dict().items():
            yield name, full_tensor(local_shard(tensor), tensor)

    def full_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's full state by parameter name, such as `blocks.0.attn.qkv.weight/exp_avg`, likewise."""
        yield from optimizer_tensors(trained_parameters(self.raw), self.raw_optimizer).items()

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `full_tensors`; the tensors must fit."""
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                local_shard(tensor).copy_(shard_like(tensors[name], tensor))

    def load_optimizer(self, state: OptimizerState) -> None:
        """The inverse of `full_optimizer`, after `check_optimizer`."""
        load_optimizer(trained_parameters(self.raw), self.raw_optimizer, state)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sum_of_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The sum of squares of all gradients (0-d, on their device): not finite where one of them is not.

    On a CPU as dot products, which take half as long there as torch's norms.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    if gradients and gradients[0].device.type == "cpu":
        flat = [each.reshape(-1) for each in gradients]
        return torch.stack([torch.dot(each, each) for each in flat]).sum()
    return torch.nn.utils.get_total_norm(gradients).square()
