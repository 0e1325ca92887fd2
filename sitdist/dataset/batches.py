"""The batches of a split: a pure function of (dataset, seed, step, rank, world size)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sitdist.dataset.format import sample_key
from sitdist.dataset.order import BlockShuffle
from sitdist.dataset.reader import Samples, SampleSource
from sitdist.errors import ConfigError, DataError

log = logging.getLogger(__name__)
REPLACEMENTS = 100  # samples that are tried in place of a damaged one


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    moments [b, 2C, h, w] float32, packed_pose [b, 4, 4] float32, label [b], and positions [b]: the samples' global
    positions in the endless sequence of epochs, which key all random numbers. `view` [b, 4, H, W] uint8: the views
    without background, where they are read.
    """

    moments: Tensor
    packed_pose: Tensor
    label: Tensor
    positions: Tensor
    keys: list[str]
    view: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Copy to page-locked memory, from which copies to a GPU run beside other work."""
        return self._each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


class BatchReader:
    """Global batch k is positions [k G, (k + 1) G) of the endless sequence of permutations; each rank takes its slice.

    No state is kept from step to step: several threads can ask for the batch of any step at any time. With
    `on_bad_sample` "replace", another sample of the same window, chosen by (seed, position), replaces a damaged one;
    `bad_samples` counts how often this process met each, and more than `max_bad_samples` of them are an error.

    With several `nodes`, the nth part of every global batch comes from node n's own endless sequence over shards n,
    n + nodes, ... so that a node reads or fetches no other shards.
    """

    def __init__(
        self,
        reader: SampleSource,
        seed: int,
        global_batch: int,
        on_bad_sample: Literal["stop", "replace"] = "stop",
        max_bad_samples: int = 0,
        nodes: int = 1,
    ) -> None:
        assert global_batch % nodes == 0, (global_batch, nodes)
        if nodes > len(reader.shard_counts):
            raise ConfigError(
                f"reader.split_by_node: {len(reader.shard_counts)} shards cannot be split over {nodes} nodes; set it "
                "to false, or build the dataset with a smaller samples_per_shard"
            )
        self.reader, self.global_batch, self.nodes = reader, global_batch, nodes
        shards = range(len(reader.shard_counts))
        self.orders = [BlockShuffle(reader.shard_counts, seed, shards[node::nodes]) for node in range(nodes)]
        self.bad_samples: Counter[str] = Counter()
        self._on_bad_sample, self._max_bad_samples = on_bad_sample, max_bad_samples
        self._expected: tuple[int, int] | None = None

    def positions(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Global positions [G / world] int64 of a rank's slice."""
        assert self.global_batch % world == 0, (self.global_batch, world)
        share = self.global_batch // world
        first = step * self.global_batch + rank * share
        return torch.arange(first, first + share)

    def sample_indices(self, positions: Tensor) -> np.ndarray:
        """The samples [b] int64 at global positions [b]."""
        indices = np.empty(len(positions), dtype=np.int64)
        nodes, places = self._node_places(positions.numpy())
        for node in np.unique(nodes).tolist():
            rows = nodes == node
            indices[rows] = self.orders[node].samples(places[rows])
        return indices

    def _node_places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The node of each global position, and its place in that node's sequence."""
        share = self.global_batch // self.nodes
        steps, places = np.divmod(positions, self.global_batch)
        return places // share, steps * share + places % share

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """One rank's slice of the global batch of `step`; DataError for a damaged sample that may not be replaced."""
        positions = self.positions(step, rank, world)
        self._read_ahead(positions)
        indices = self.sample_indices(positions)
        samples = self.reader.samples(indices)
        for row in sorted(samples.faults):
            indices[row] = self._replace(samples, row, int(indices[row]), int(positions[row]))
        keys = [sample_key(index) for index in indices.tolist()]
        return Batch(samples.moments.float(), samples.packed_pose, samples.label, positions, keys, samples.view)

    def reading(self) -> list[str]:
        """The shards that threads are reading now."""
        return self.reader.reading()

    def _read_ahead(self, positions: Tensor) -> None:
        """When a window begins, fetch it and the next one in the background."""
        (node,), place = self._node_places(positions[-1:].numpy())
        order = self.orders[node]
        window = order.windows(place)[0]
        if window != self._expected:
            self._expected = window
            following = order.window_after(*window)
            self.reader.expect([*order.shards(*window), *order.shards(*following)])

    def _replace(self, samples: Samples, row: int, index: int, position: int) -> int:
        """Replace a damaged sample by another one; return its index."""
        fault = samples.faults[row]
        if self._on_bad_sample == "stop":
            raise DataError(fault)
        self._count(index, fault)
        (node,), (place,) = self._node_places(np.asarray([position]))
        for attempt in range(REPLACEMENTS):
            replacement = self.orders[node].replacement(int(place), attempt)
            found = self.reader.samples(np.asarray([replacement]))
            if not found.faults:
                samples.moments[row] = found.moments[0]
                samples.packed_pose[row] = found.packed_pose[0]
                samples.label[row] = found.label[0]
                if samples.view is not None and found.view is not None:
                    samples.view[row] = found.view[0]
                return replacement
        raise DataError(f"{fault}; and {REPLACEMENTS} others that were to replace it are damaged too")

    def _count(self, index: int, fault: str) -> None:
        key = sample_key(index)
        self.bad_samples[key] += 1
        count = len(self.bad_samples)
        if count > self._max_bad_samples:
            raise DataError(f"{fault}; the {count} bad samples of this process are more than {self._max_bad_samples}")
        if self.bad_samples[key] == 1:
            log.warning("%s; replaced (bad sample %d of at most %d)", fault, count, self._max_bad_samples)
