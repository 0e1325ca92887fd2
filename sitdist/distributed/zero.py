"""DeepSpeed's ZeRO: weights are full everywhere, the optimizer's state is sharded, and in stage 2 the gradients too."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sitdist.distributed.ddp import DDP, MakeOptimizer, trained_parameters
from sitdist.distributed.optimizer_state import OptimizerState
from sitdist.errors import ConfigError


class Zero(DDP):
    """Every process updates its shard of the weights, and gets the others' from the others.

    DeepSpeed looks at the gradient's norm on the host, and itself skips a step where the norm is not finite.
    """

    settles_buckets = False

    def __init__(self, accelerator: Accelerator, stage: int) -> None:
        super().__init__(accelerator)
        self.name, self._stage = f"zero{stage}", stage

    def setup(self, model: nn.Module, ema: nn.Module, make_optimizer: MakeOptimizer, clip_norm: float | None) -> None:
        deepspeed = _import_deepspeed(self._accelerator.device.type)
        self.raw, self._clip_norm = model, clip_norm
        self.raw_optimizer = make_optimizer(list(trained_parameters(model).values()))
        self.raw_optimizer.state.clear()  # of whole parameters; DeepSpeed makes that of its flat shards
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # required, but the trainer splits the batch
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

    def accumulate(self, is_last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self) -> Tensor:
        norm = self._zero.scaled_global_norm()  # -1 if not finite; DeepSpeed clips in its step
        return torch.where(norm < 0, torch.inf, norm)

    def update(self, lr: float, ok: Tensor) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr
        with _quiet():
            self._engine.step()  # also drops the gradients

    def full_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        (shard,) = self._zero.single_partition_of_fp32_groups
        kinds = {kind: value for kind, value in self.raw_optimizer.state[shard].items() if isinstance(value, Tensor)}
        for name, parameter in trained_parameters(self.raw).items():
            for kind, value in sorted(kinds.items()):
                yield f"{name}/{kind}", value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, kind)

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().load(model, tensors)
        if model is self.raw:
            self._zero.refresh_fp32_params()

    def load_optimizer(self, state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        kinds = {kind: value for of in state.values() for kind, value in of.items()}
        for shard in self._zero.single_partition_of_fp32_groups:
            of_shard = self.raw_optimizer.state[shard]
            for kind, value in kinds.items():
                if value.ndim == 0:  # a count of steps, the same for all
                    of_shard[kind] = value.to(shard.device, copy=True)
                elif kind not in of_shard:
                    of_shard[kind] = torch.zeros_like(shard)
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in trained_parameters(self.raw).items():
            for kind, value in state.get(name, {}).items():
                if value.ndim > 0:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)


def _import_deepspeed(device: str) -> Any:
    """Import DeepSpeed, without compiling its own operator for messages between processes of one CPU machine."""
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
    """Show only warnings: DeepSpeed logs a page of its settings at every start."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
