"""What one training step sees: how a global batch is split, and the endpoints, times and labels of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sitdist.config.experiment import Config
from sitdist.dataset.batches import Batch
from sitdist.errors import ConfigError
from sitdist.flow import draws
from sitdist.flow.endpoint import Endpoint, sample_times
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.loss import training_interval
from sitdist.model.codec import draw_latent


@dataclass(frozen=True)
class BatchSplit:
    """How many samples of a global batch one process has, and how many of them go through the model at a time."""

    local: int
    micro: int


def split_batch(global_batch: int, world: int, max_per_device: int | None) -> BatchSplit:
    """Equal shares for `world` processes and equal micro-batches of at most `max_per_device` samples."""
    if global_batch % world:
        below, above = global_batch // world * world, math.ceil(global_batch / world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"train.global_batch = {global_batch}: cannot be divided by {world} processes; "
            f"set it to {nearest}, or start another number of processes"
        )
    local = global_batch // world
    largest = min(local, max_per_device or local)
    return BatchSplit(local, next(size for size in range(largest, 0, -1) if local % size == 0))


@dataclass(frozen=True)
class Inputs:
    """The inputs of a forward pass. `packed_pose` is for a model that is conditioned on the pose."""

    x0: Tensor  # [B, C, h, w]
    x1: Tensor  # [B, C, h, w]
    t: Tensor  # [B]
    y: Tensor  # [B], labels
    drop_labels: Tensor | None  # bool [B]
    packed_pose: Tensor  # [B, 4, 4]

    def split(self, size: int) -> Iterator[Inputs]:
        """Micro-batches of `size` samples."""
        for start in range(0, len(self.t), size):
            rows = slice(start, start + size)
            values: dict[str, Any] = {
                name: None if value is None else value[rows] for name, value in vars(self).items()
            }
            yield Inputs(**values)


def make_inputs(batch: Batch, config: Config, endpoint: Endpoint, interpolant: Interpolant) -> Inputs:
    """The inputs of `batch`. Every random number is keyed by (seed, global position), not by process."""
    channels, height, width = batch.moments.shape[1] // 2, *batch.moments.shape[2:]

    def normal(stream: str) -> Tensor:
        numbers = draws.normal(config.seed, stream, batch.positions, channels * height * width)
        return numbers.reshape(-1, channels, height, width)

    def uniform(stream: str, count: int) -> Tensor:
        return draws.uniform(config.seed, stream, batch.positions, count)

    flow, dropout = config.flow, config.model.class_dropout_prob
    interval = training_interval(interpolant, flow.prediction, flow.loss_weight)
    return Inputs(
        x0=endpoint.x0(batch.packed_pose, normal("noise")),
        x1=draw_latent(batch.moments, normal("posterior")),
        t=sample_times(uniform("time", 2), flow.share_at_one, flow.share_at_zero, interval),
        y=batch.label,
        drop_labels=uniform("dropout", 1)[:, 0] < dropout if dropout > 0 else None,
        packed_pose=batch.packed_pose,
    )
