"""The order of the samples: shuffled in blocks, and computed on demand instead of stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sitdist.dataset.lru_cache import LruCache
from sitdist.flow import draws

WINDOW = 8  # number of shards that are shuffled together


@dataclass(frozen=True)
class _Epoch:
    """The order of the shards, and the places in the epoch where its windows begin, followed by the end."""

    shards: np.ndarray
    bounds: np.ndarray


class BlockShuffle:
    """The endless sequence of epochs over shards of `shard_counts` samples, with random access.

    Each epoch shuffles the shards, then the samples inside windows of WINDOW shards, so that disks read in long runs.
    The order is a pure function of (shard_counts, seed, shards). An epoch costs one permutation of its shards and a
    window one permutation of its samples; the most recent ones are cached. `shards`: use only the shards with these
    numbers.
    """

    def __init__(self, shard_counts: Sequence[int], seed: int, shards: Sequence[int] | None = None) -> None:
        self.seed = seed
        self._counts = np.asarray(shard_counts, dtype=np.int64)
        self._shards = np.arange(len(shard_counts)) if shards is None else np.asarray(shards, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self._epoch = LruCache(self._make_epoch, 2)
        self._window = LruCache(self._make_window, 4)

    def __len__(self) -> int:
        return int(self._counts[self._shards].sum())

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples at global positions [B] int64, as [B] int64."""
        samples = np.empty(len(positions), dtype=np.int64)
        for epoch, window, rows, places in self._by_window(positions):
            samples[rows] = self._window((epoch, window))[places]
        return samples

    def replacement(self, position: int, attempt: int) -> int:
        """A sample of the same window to replace the one at a global position; each attempt gives another one.

        A pure function of (shard_counts, seed, position, attempt).
        """
        ((epoch, window, _, _),) = self._by_window(np.asarray([position]))
        samples = self._window((epoch, window))
        drawn = draws.uniform(self.seed, f"stand-in {attempt}", torch.tensor([position]), 1)
        return int(samples[int(float(drawn) * len(samples))])

    def windows(self, positions: np.ndarray) -> list[tuple[int, int]]:
        """(epoch, window) of every window that holds one of the global positions, in order."""
        return [(epoch, window) for epoch, window, _, _ in self._by_window(positions)]

    def window_after(self, epoch: int, window: int) -> tuple[int, int]:
        """(epoch, window) of the window after this one."""
        return (epoch, window + 1) if (window + 1) * WINDOW < len(self._shards) else (epoch + 1, 0)

    def shards(self, epoch: int, window: int) -> list[int]:
        """The shards of a window."""
        return self._epoch(epoch).shards[window * WINDOW : (window + 1) * WINDOW].tolist()

    def _by_window(self, positions: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Epoch, window, the rows of the positions that lie in it, and their places in the window."""
        epochs, places = np.divmod(positions, len(self))
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            bounds = self._epoch(epoch).bounds
            windows = np.searchsorted(bounds, places[rows], side="right") - 1
            for window in np.unique(windows).tolist():
                inside = rows[windows == window]
                yield epoch, window, inside, places[inside] - bounds[window]

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = self._shards[draws.permutation(self.seed, "shard order", len(self._shards), epoch).numpy()]
        ends = np.cumsum(self._counts[shards])
        return _Epoch(shards, np.concatenate([[0], ends[WINDOW - 1 :: WINDOW], ends[-1:]]))

    def _make_window(self, key: tuple[int, int]) -> np.ndarray:
        """The samples of a window, in the epoch's order."""
        epoch, window = key
        samples = np.concatenate(
            [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in self.shards(epoch, window)]
        )
        return samples[draws.permutation(self.seed, f"window {window}", len(samples), epoch).numpy()]
