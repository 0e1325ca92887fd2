"""A small split held in memory, on the CPU or on the device that trains."""

from __future__ import annotations

import numpy as np
import torch

from sitdist.dataset.reader import Samples, ShardReader
from sitdist.io.files import require_memory

CHUNK = 1024  # samples that are read at a time


class ResidentSamples:
    """All samples of a split on `device`, read and checked once; the files are not touched again.

    It gives the same samples and faults as `reader`. It needs memory for the moments, packed pose and label of every
    sample: 4.2 KB each with latents of 4x16x16.
    """

    def __init__(self, reader: ShardReader, device: torch.device | str = "cpu") -> None:
        self.shard_counts = reader.shard_counts
        self._faults: dict[int, str] = {}
        latent = reader.manifest.latent
        each = 4 * (2 * latent.channels * latent.height * latent.width + 16) + 8
        each += 4 * reader.manifest.image_size**2 if reader.views else 0
        require_memory(2 * each * len(reader), f"{len(reader):,} resident samples", "set reader.resident to false")
        parts = []
        for first in range(0, len(reader), CHUNK):
            part = reader.samples(np.arange(first, min(first + CHUNK, len(reader))))
            self._faults |= {first + row: fault for row, fault in part.faults.items()}
            tensors = (part.moments, part.packed_pose, part.label, part.view)
            parts.append([tensor.to(device) for tensor in tensors if tensor is not None])
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        self._moments, self._packed_pose, self._label = columns[:3]
        self._view = columns[3] if len(columns) > 3 else None

    def samples(self, indices: np.ndarray) -> Samples:
        """The samples `indices` [B] int64; `faults` names those that are damaged."""
        at = torch.from_numpy(indices).to(self._moments.device)
        rows = [row for row, index in enumerate(indices.tolist()) if index in self._faults] if self._faults else []
        faults = {row: self._faults[int(indices[row])] for row in rows}
        view = None if self._view is None else self._view[at]
        return Samples(self._moments[at], self._packed_pose[at], self._label[at], faults, view)

    def reading(self) -> list[str]:
        """No shard is read."""
        return []

    def expect(self, shards: list[int]) -> None:
        """Nothing has to be fetched."""
