"""What one training step sees: how a global batch is split, and the endpoints, times and labels of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sitdist.config.experiment import Config
from sitdist.dataset.appearance import Appearance, draw_moves, moved
from sitdist.dataset.batches import Batch
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError
from sitdist.flow import draws
from sitdist.flow.endpoint import Endpoint, sample_times
from sitdist.flow.interpolant import Interpolant
from sitdist.flow.loss import training_interval
from sitdist.geometry.packing import PoseStatistics, destandardize, packed_intrinsics, standardize
from sitdist.model.codec import Codec, draw_latent


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


def draw_times(config: Config, interpolant: Interpolant, positions: Tensor) -> Tensor:
    """The times t [B] float32 of the samples at global positions [B]."""
    flow = config.flow
    interval = training_interval(interpolant, flow.prediction, flow.loss_weight)
    uniforms = draws.uniform(config.seed, "time", positions, 2)
    return sample_times(uniforms, flow.share_at_one, flow.share_at_zero, interval)


class VariedViews:
    """Shows samples at t = 1, which train reading poses, in a new appearance at every visit; the others stay clean.

    ConfigError where a dataset's cameras cannot be moved as the config says.
    """

    def __init__(self, config: Config, interpolant: Interpolant, reader: ShardReader, codec: Codec) -> None:
        assert config.appearance is not None
        manifest = reader.manifest
        self._config, self._interpolant, self._codec, self._moves = config, interpolant, codec, config.appearance
        self._draw = Appearance(config.appearance, config.seed, manifest.image_size, manifest.backgrounds())
        self._statistics = PoseStatistics.from_dict(manifest.statistics)
        packed, facts = self._statistics.has_intrinsics, manifest.splits["train"].cameras
        if self._moves.zoom > 1 and not packed:
            raise ConfigError(
                f"appearance.zoom {self._moves.zoom:g}: the dataset packs no focal lengths to label it with; build it "
                "with packing: intrinsics, or leave zoom out"
            )
        if self._moves.moves_cameras and not packed and not (facts is not None and facts.same_intrinsics):
            raise ConfigError(
                "appearance moves cameras, but the dataset's have different focal lengths and none are packed; build "
                "it with packing: intrinsics, or leave roll_deg and turn_deg out"
            )
        self._intrinsics = reader.intrinsics([0])  # [1, 4], where all cameras have the same

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Batch:
        """The batch with latents, and where cameras move poses, of varied views."""
        assert batch.view is not None
        rows = (draw_times(self._config, self._interpolant, batch.positions) == 1).nonzero()[:, 0]
        if not len(rows):
            return replace(batch, view=None)
        views, positions = batch.view[rows], batch.positions[rows]
        packed_pose = batch.packed_pose
        if self._moves.moves_cameras:
            views, moved_pose = self._move(views, packed_pose[rows], positions)
            packed_pose = packed_pose.index_copy(0, rows, moved_pose)
        pictures = self._draw(views, batch.label[rows], positions)
        moments = batch.moments.index_copy(0, rows, self._codec.encode_moments(pictures).to(batch.moments))
        return replace(batch, moments=moments, packed_pose=packed_pose, view=None)

    def _move(self, views: Tensor, packed_pose: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn and zoom the cameras of views [B, 4, H, W] uint8; returns the views and packed poses after it."""
        rotation, zoom = draw_moves(self._moves, self._config.seed, positions)
        intrinsics = packed_intrinsics(packed_pose, self._statistics)
        if intrinsics is None:
            intrinsics = self._intrinsics.to(views.device).expand(len(views), 4)
        camera_to_world = destandardize(packed_pose, self._statistics)
        camera_to_world[:, :3, :3] = camera_to_world[:, :3, :3] @ rotation
        seen = moved(views.float() / 255.0, rotation, zoom, intrinsics)
        factor = torch.stack([zoom, zoom, torch.ones_like(zoom), torch.ones_like(zoom)], dim=-1)
        packed = standardize(camera_to_world, self._statistics, intrinsics * factor)
        return (seen.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8), packed.to(packed_pose)


def make_inputs(batch: Batch, config: Config, endpoint: Endpoint, interpolant: Interpolant) -> Inputs:
    """The inputs of `batch`. Every random number is keyed by (seed, global position), not by process."""
    channels, height, width = batch.moments.shape[1] // 2, *batch.moments.shape[2:]

    def normal(stream: str) -> Tensor:
        numbers = draws.normal(config.seed, stream, batch.positions, channels * height * width)
        return numbers.reshape(-1, channels, height, width)

    def uniform(stream: str, count: int) -> Tensor:
        return draws.uniform(config.seed, stream, batch.positions, count)

    dropout = config.model.class_dropout_prob
    return Inputs(
        x0=endpoint.x0(batch.packed_pose, normal("noise")),
        x1=draw_latent(batch.moments, normal("posterior")),
        t=draw_times(config, interpolant, batch.positions),
        y=batch.label,
        drop_labels=uniform("dropout", 1)[:, 0] < dropout if dropout > 0 else None,
        packed_pose=batch.packed_pose,
    )
