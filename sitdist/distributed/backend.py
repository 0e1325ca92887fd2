"""How the processes of a run share its weights, gradients and optimizer: what a launcher's file asks for.

    ddp      every process holds all of them (DDP); a single process holds all of them anyhow
    fsdp2    every process holds its share of each (torch's fully_shard)
    zero1    weights and gradients are whole everywhere, the optimizer's state is shared out (DeepSpeed)
    zero2    the gradients too

A checkpoint holds whole tensors whatever the backend, so that a run goes on with any other, on any number of processes.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from sitdist.distributed.local_shards import local_part, local_shards, part_of, whole_of
from sitdist.distributed.optimizer_state import OptimizerState, load_optimizer, optimizer_tensors
from sitdist.errors import ConfigError

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


class Replicas:
    """Every process holds everything, and DDP averages the gradients; also a process that is alone."""

    name = "ddp"
    shares_weights = False

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def set_up(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        """Share `model` and its average out, in place, and make the optimizer; every process calls it."""
        self.raw, self._clip_norm = model, clip_norm
        self.raw_optimizer = make_optimizer(_trained(model))
        self.model, self.optimizer = self._accelerator.prepare(model, self.raw_optimizer)

    @property
    def settles_buckets(self) -> bool:
        """Whether gradients are summed in an order that the first backward pass decides."""
        return self._accelerator.num_processes > 1

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; with the last one (see `accumulating`) they are averaged over processes."""
        self._accelerator.backward(loss)

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.model)

    def clip_gradients(self) -> Tensor:
        """Clip to `clip_norm`; returns the norm before (0-d, on the device), which is the same on every process."""
        self._accelerator.unscale_gradients(self.optimizer)
        trained = _trained(self.raw)
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
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Before the next backward pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The state dict of `model`, that of the run or its average, one by one; every process goes through it."""
        for name, tensor in model.state_dict().items():
            yield name, whole_of(local_part(tensor), tensor)

    def whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state by parameter name, such as `blocks.0.attn.qkv.weight/exp_avg`, as `whole` does it."""
        yield from optimizer_tensors(_named(self.raw), self.raw_optimizer).items()

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `whole`: tensors that fit."""
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                local_part(tensor).copy_(part_of(tensors[name], tensor))

    def load_optimizer(self, state: OptimizerState) -> None:
        """The inverse of `whole_optimizer`, after `checkpoint.check_optimizer`."""
        load_optimizer(_named(self.raw), self.raw_optimizer, state)


class ShardedWeights(Replicas):
    """FSDP2: block by block a process gathers the weights it needs, and keeps its share of what it computes.

    The optimizer works on the shares as plain tensors, so that its fused kernels serve here too.
    """

    name = "fsdp2"
    shares_weights = True
    settles_buckets = False

    def set_up(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is changed in place
        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        for each in (model, ema):
            for block in each.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(each, mesh=mesh)
        self.raw, self._clip_norm = model, clip_norm
        self._shares = {name: nn.Parameter(part) for name, part in local_shards(model).items()}
        self.raw_optimizer = self.optimizer = make_optimizer(list(self._shares.values()))
        self.model = self._accelerator.prepare_model(model, evaluation_mode=True)  # autocast, and nothing else

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        self.raw.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        self.raw.set_is_last_backward(is_last)  # type: ignore[operator]
        return nullcontext()

    def clip_gradients(self) -> Tensor:
        for name, parameter in _named(self.raw).items():
            self._shares[name].grad = None if parameter.grad is None else local_part(parameter.grad)
        squares = sum_of_squares(self._shares.values())
        dist.all_reduce(squares)
        norm = squares.sqrt()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._shares.values(), self._clip_norm, norm)
        return norm

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.raw.zero_grad(set_to_none=True)

    def whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        parameters = _named(self.raw)
        for key, value in optimizer_tensors(self._shares, self.raw_optimizer).items():
            yield key, value if value.ndim == 0 else whole_of(value, parameters[key.rpartition("/")[0]])

    def load_optimizer(self, state: OptimizerState) -> None:
        parameters = _named(self.raw)
        shared = {
            name: {kind: value if value.ndim == 0 else part_of(value, parameters[name]) for kind, value in of.items()}
            for name, of in state.items()
        }
        load_optimizer(self._shares, self.raw_optimizer, shared)


class SharedOptimizer(Replicas):
    """DeepSpeed's ZeRO: every process updates its share of the weights, and gets the others' from the others.

    `stage` 1: gradients are averaged as a whole; 2: each process keeps those of its share only. DeepSpeed looks at the
    gradient's norm on the host, and leaves a step out itself where it is not finite.
    """

    settles_buckets = False

    def __init__(self, accelerator: Accelerator, stage: int) -> None:
        super().__init__(accelerator)
        self.name, self._stage = f"zero{stage}", stage

    def set_up(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        deepspeed = _import_deepspeed(self._accelerator.device.type)
        self.raw, self._clip_norm = model, clip_norm
        self.raw_optimizer = make_optimizer(_trained(model))
        self.raw_optimizer.state.clear()  # that of whole parameters: what is left is that of shares of all in a row
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # the loop's own matter
            "zero_optimization": {"stage": self._stage, "contiguous_gradients": False, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": clip_norm or 0.0,
        }
        with _quiet():
            self._engine, self._zero, *_ = deepspeed.initialize(
                model=model, optimizer=self.raw_optimizer, config=settings, dist_init_required=False
            )
        self.model, self.optimizer = self._autocast, self._zero
        if self._engine.zero_optimization_stage() != self._stage:
            raise ConfigError(
                f"DeepSpeed took ZeRO stage {self._engine.zero_optimization_stage()} where the launcher asks for "
                f"{self._stage}; start plain data parallelism (launch/ddp.yaml)"
            )

    def _autocast(self, *inputs: Any, **named: Any) -> Tensor:
        with self._accelerator.autocast():
            return self._engine(*inputs, **named).float()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def clip_gradients(self) -> Tensor:
        norm = self._zero.scaled_global_norm()  # -1 for what is not finite; clipped in the step
        return torch.where(norm < 0, torch.inf, norm)

    def forget_gradients(self) -> None:
        """DeepSpeed has done it."""

    def update(self, lr: float, ok: Tensor) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr
        with _quiet():
            self._engine.step()

    def whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        (share,) = self._zero.single_partition_of_fp32_groups
        kinds = {kind: value for kind, value in self.raw_optimizer.state[share].items() if isinstance(value, Tensor)}
        for name, parameter in _named(self.raw).items():
            for kind, value in sorted(kinds.items()):
                whole = value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, kind)
                yield f"{name}/{kind}", whole

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().load(model, tensors)
        if model is self.raw:
            self._zero.refresh_fp32_params()

    def load_optimizer(self, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        kinds = {kind: value for of in state.values() for kind, value in of.items()}
        for share in self._zero.single_partition_of_fp32_groups:
            of_share = self.raw_optimizer.state[share]
            for kind, value in kinds.items():
                if value.ndim == 0:  # a count of steps, the same for all
                    of_share[kind] = value.to(share.device, copy=True)
                elif kind not in of_share:
                    of_share[kind] = torch.zeros_like(share)
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in _named(self.raw).items():
            for kind, value in state.get(name, {}).items():
                if value.ndim > 0:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)


def sum_of_squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all numbers in the gradients of `parameters` (0-d, on their device): not finite where one of them is not.

    On a CPU as dot products, which take half as long there as torch's norms.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    if gradients and gradients[0].device.type == "cpu":
        flat = [each.reshape(-1) for each in gradients]
        return torch.stack([torch.dot(each, each) for each in flat]).sum()
    return torch.nn.utils.get_total_norm(gradients).square()


def make_backend(name: str, accelerator: Accelerator) -> Replicas:
    """The backend called `name` for these processes; one that is alone has nothing to share.

    ConfigError where it does not go with the precision, or DeepSpeed is not installed.
    """
    if name == "ddp" or accelerator.num_processes == 1:
        return Replicas(accelerator)
    if accelerator.scaler is not None:
        raise ConfigError(
            f"train.precision = 'fp16': not together with {name}, whose gradients are scaled by no one; use bf16, or "
            "start plain data parallelism (launch/ddp.yaml)"
        )
    if name == "fsdp2":
        return ShardedWeights(accelerator)
    return SharedOptimizer(accelerator, int(name.removeprefix("zero")))


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return list(_named(model).values())


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed, told not to compile an operator of its own for messages between processes of one CPU machine."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        try:
            import deepspeed
        except ImportError:
            raise ConfigError(
                "the launcher asks for DeepSpeed, which is not installed; pip install 'sitdist[deepspeed]', or start "
                "with launch/fsdp2.yaml"
            ) from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed tells a page of its own settings at every start: warnings alone are let through."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
