"""Tar shards without an index, as a stream of batches by webdataset's own pipeline stages.

For shards that nobody indexed. Unlike `reader` it cannot resume exactly: a resumed run begins a new epoch's stream. A
truncated tar only looks shorter, altered bytes are not noticed, and ranks may get different numbers of batches unless
the stream is resampled. Only the members that are needed are read, by explicit decoders; nothing is unpickled, and no
URL runs a command.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset

from sitdist.errors import DataError

MEMBERS = ("moments.npy", "packed_pose.npy", "meta.json")
Streamed = tuple[Tensor, Tensor, Tensor]  # moments [B, 2C, h, w] float32, packed poses [B, 4, 4] float32, labels [B]


def stream_batches(
    urls: Sequence[str],
    batch: int,
    seed: int,
    epoch: int = 0,
    resample: bool = False,
    shuffle_buffer: int = 2000,
) -> webdataset.DataPipeline:
    """An iterable of batches from tars by path or fsspec URL, in an order by (seed, epoch).

    Shards are split over ranks, then over DataLoader workers: without `resample` each is read once, with it they are
    drawn without end, by a generator of (seed, epoch, rank, worker). DataError where a sample is not of the format.
    """
    splitting = () if resample else (webdataset.split_by_node, webdataset.split_by_worker)
    return webdataset.DataPipeline(
        ShardUrls(urls, seed, epoch, resample),
        *splitting,
        _opened,
        webdataset.pipelinefilter(webdataset.tariterators.tar_file_expander)(select_files=_is_needed),
        webdataset.pipelinefilter(webdataset.tariterators.group_by_keys)(),
        webdataset.shuffle(shuffle_buffer, initial=shuffle_buffer, seed=_hash(seed, epoch)),
        webdataset.map(decode),
        webdataset.batched(batch, collation_fn=collate, partial=not resample),
    )


class ShardUrls(IterableDataset):
    """The shards of an epoch: all of them in an order by (seed, epoch), or draws without end, others for every worker.

    webdataset's own resampling takes its seed from the clock, whatever seed it is given.
    """

    def __init__(self, urls: Sequence[str], seed: int, epoch: int, resample: bool) -> None:
        if not urls:
            raise DataError("no shards to stream; give the paths or URLs of .tar files")
        self._urls, self._seed, self._epoch, self._resample = list(urls), seed, epoch, resample

    def __iter__(self) -> Iterator[dict[str, str]]:
        if self._resample:
            rank, _, worker, _ = webdataset.utils.pytorch_worker_info()
            generator = random.Random(_hash(self._seed, self._epoch, rank, worker))
            yield from ({"url": generator.choice(self._urls)} for _ in itertools.count())
        order = random.Random(_hash(self._seed, self._epoch)).sample(self._urls, len(self._urls))
        yield from ({"url": url} for url in order)


def _hash(*numbers: int) -> str:
    """What seeds Python's generator by its text, the same in every process."""
    return "/".join(map(str, numbers))


def _opened(shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Opens tars through fsspec, which knows no URL that runs a command (webdataset's own opener does)."""
    import fsspec

    for shard in shards:
        try:
            with fsspec.open(shard["url"], "rb") as stream:
                yield shard | {"stream": stream}
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"{shard['url']}: cannot be read ({error}); check the address and its package") from None


def _is_needed(name: str) -> bool:
    return name.partition(".")[2] in MEMBERS


def decode(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Moments, packed pose and label of a sample's bytes; DataError if one is missing or not of the format."""
    try:
        moments, pose = (
            np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in ("moments.npy", "packed_pose.npy")
        )
        return moments, pose, int(json.loads(sample["meta.json"])["label"])
    except (KeyError, ValueError, TypeError) as error:
        where = f"{sample['__url__']}: sample {sample['__key__']}"
        raise DataError(f"{where}: not of the format ({error!r}); see shards/README.md") from None


def collate(samples: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Streamed:
    """Decoded samples as a batch."""
    moments, poses, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(moments)).float(), torch.from_numpy(np.stack(poses)), torch.tensor(labels)
