"""FSDP2 (torch's fully_shard): every process holds its shard of weights, gradients and optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sitdist.distributed.ddp import DDP, MakeOptimizer, sum_of_squares, trained_parameters
from sitdist.distributed.local_shards import full_tensor, local_shard, local_shards, shard_like
from sitdist.distributed.optimizer_state import OptimizerState, load_optimizer, optimizer_tensors


class FSDP2(DDP):
    """Block by block a process gathers the weights that it needs, and keeps its shard of the gradients.

    The optimizer works on the shards as plain tensors, so that its fused kernels work here too.
    """

    name = "fsdp2"
    shards_weights = True
    settles_buckets = False

    def setup(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is changed in place
        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        for each in (model, ema):
            for block in each.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(each, mesh=mesh)
        self.raw, self._clip_norm = model, clip_norm
        self._shards = {name: nn.Parameter(shard) for name, shard in local_shards(model).items()}
        self.raw_optimizer = self.optimizer = make_optimizer(list(self._shards.values()))
        self.model = self._accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and nothing else

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        self.raw.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        self.raw.set_is_last_backward(is_last)  # type: ignore[operator]
        return nullcontext()

    def clip_gradients(self) -> Tensor:
        for name, parameter in trained_parameters(self.raw).items():
            self._shards[name].grad = None if parameter.grad is None else local_shard(parameter.grad)
        squares = sum_of_squares(self._shards.values())
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._shards.values(), self._clip_norm, norm)
        return norm

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.raw.zero_grad(set_to_none=True)

    def full_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        parameters = trained_parameters(self.raw)
        for key, value in optimizer_tensors(self._shards, self.raw_optimizer).items():
            yield key, value if value.ndim == 0 else full_tensor(value, parameters[key.rpartition("/")[0]])

    def load_optimizer(self, state: OptimizerState) -> None:
        parameters = trained_parameters(self.raw)
        shards = {
            name: {
                kind: value if value.ndim == 0 else shard_like(value, parameters[name]) for kind, value in of.items()
            }
            for name, of in state.items()
        }
        load_optimizer(self._shards, self.raw_optimizer, shards)
