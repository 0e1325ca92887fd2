"""The exponential moving average of the weights, in float32, which is validated, evaluated and published."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sitdist.distributed.local_shards import local_shard, local_shards
from sitdist.runs.averages import lerp_if


class Ema:
    """A copy of `model` whose parameters follow it: ema <- decay_s * ema + (1 - decay_s) * parameter.

    decay_s = min(decay, (1 + s) / (10 + s)) at update s = 0, 1, ..., so that early averages forget the initialization.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Follow `model` from now on; both may have been sharded over processes."""
        self._followed = local_shards(model)
        averaged = {name: local_shard(parameter) for name, parameter in self.model.named_parameters()}
        self._averaged: list[Tensor] = [averaged[name] for name in self._followed]

    @torch.no_grad()
    def update(self, step: int, ok: Tensor) -> None:
        """Move towards the current parameters after update number `step` (from 0), where `ok` (0-d) is true."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [part.float() for part in self._followed.values()]
        lerp_if(self._averaged, now, 1.0 - decay, ok)
